//! What the operations do, a bounded piece at a time. Moves go straight from place to place; the others pass through
//! a scratch buffer, because the bus lends no memory.

mod delta;
mod dif;

use underpass::model::{Bus, DmaFault};
use underpass::{Iova, Pasid};

use super::engine::fault_status;
use super::spec::{CompletionRecord, Descriptor, Handshake, Opcode, Status, compare_result, flag};
use crate::ops;

/// Bytes that pass through the scratch buffer at once, at most.
const PIECE: usize = 64 * 1024;

/// How an operation ended: what the completion record says.
#[derive(Debug, Clone, Copy)]
pub(super) struct Outcome(pub(super) CompletionRecord);

impl Outcome {
    #[inline]
    pub(super) const fn new(status: Status) -> Self {
        let handshake = Handshake::new().with_status(status.0);
        Self(CompletionRecord { handshake, fault_address: 0, specific: [0; 2] })
    }

    /// A fault on an operand, after `completed` bytes.
    fn fault(fault: &DmaFault, completed: u64) -> Self {
        Self::new(fault_status(fault)).with_completed(completed as u32).fault_at(fault.iova)
    }

    pub(super) fn fault_at(mut self, iova: Iova) -> Self {
        self.0.fault_address = iova.get();
        self
    }

    #[inline]
    pub(super) fn status(&self) -> Status {
        Status(self.0.handshake.status())
    }

    fn with_status(mut self, status: Status) -> Self {
        self.0.handshake.set_status(status.0);
        self
    }

    fn with_result(mut self, result: u8) -> Self {
        self.0.handshake.set_result(result);
        self
    }

    #[inline]
    pub(super) fn with_completed(mut self, completed: u32) -> Self {
        self.0.handshake.set_completed(completed);
        self
    }

    pub(super) fn with_specific(mut self, specific: [u64; 2]) -> Self {
        self.0.specific = specific;
        self
    }

    /// After invalid flags: which.
    pub(super) fn invalid_flags(&self) -> u32 {
        if self.status() == Status::INVALID_FLAGS { self.0.invalid_flags() } else { 0 }
    }
}

/// How far a step brought an operation.
#[derive(Debug)]
pub(super) enum Progress {
    More,
    Finished(Outcome),
}

/// An engine's buffers, made once.
pub(super) struct Scratch {
    first: Box<[u8]>,
    second: Box<[u8]>,
    out: Box<[u8]>,
}

impl Scratch {
    pub(super) fn new() -> Self {
        let buffer = |len| vec![0; len].into_boxed_slice();
        // The largest delta record of a piece is 10 bytes for each 8; protection information adds 8 for each 512.
        Self { first: buffer(PIECE), second: buffer(PIECE), out: buffer(PIECE / 8 * 10) }
    }
}

/// A read into a buffer: the bytes that came, and the fault that ended it.
struct Read<'a> {
    bytes: &'a [u8],
    fault: Option<DmaFault>,
}

fn read<'a>(bus: &mut Bus, pasid: Option<Pasid>, at: u64, buffer: &'a mut [u8]) -> Read<'a> {
    let fault = bus.read(pasid, Iova::new(at), buffer).err();
    let got = fault.map_or(buffer.len(), |fault| (fault.done as usize).min(buffer.len()));
    Read { bytes: &buffer[..got], fault }
}

/// An operation that was checked and has begun.
pub(super) struct Job {
    opcode: Opcode,
    pub(super) descriptor: Descriptor,
    /// Bytes of the source that are done.
    pub(super) done: u64,
    /// CRC: the value so far. Create delta: bytes of the record so far. Apply delta: the lowest unit that may come.
    carry: u32,
    /// A CRC has its seed.
    seeded: bool,
}

/// Bus, PASID and buffers of one step.
struct Context<'a> {
    bus: &'a mut Bus,
    pasid: Option<Pasid>,
    scratch: &'a mut Scratch,
}

impl Job {
    #[inline]
    pub(super) fn new(opcode: Opcode, descriptor: Descriptor) -> Self {
        Self { opcode, descriptor, done: 0, carry: 0, seeded: false }
    }

    /// Does a piece of up to `budget` bytes.
    #[inline]
    pub(super) fn advance(
        &mut self,
        bus: &mut Bus,
        pasid: Option<Pasid>,
        scratch: &mut Scratch,
        budget: usize,
    ) -> Progress {
        if self.opcode == Opcode::MemoryMove {
            return self.memory_move(bus, pasid, budget);
        }
        let ended = match self.opcode {
            Opcode::Fill => self.fill(bus, pasid, budget),
            Opcode::Compare | Opcode::ComparePattern => self.compare(Context { bus, pasid, scratch }),
            Opcode::CreateDelta => self.create_delta(Context { bus, pasid, scratch }),
            Opcode::ApplyDelta => self.apply_delta(Context { bus, pasid, scratch }),
            Opcode::Dualcast => self.dualcast(Context { bus, pasid, scratch }),
            Opcode::Crc | Opcode::CopyCrc => self.crc(Context { bus, pasid, scratch }),
            Opcode::DifCheck | Opcode::DifInsert | Opcode::DifStrip | Opcode::DifUpdate => {
                self.dif(Context { bus, pasid, scratch })
            }
            Opcode::CacheFlush => self.flush(bus, pasid, budget),
            // Done by the engine itself, or nothing at all.
            Opcode::NoOp | Opcode::Batch | Opcode::Drain | Opcode::MemoryMove => {
                Err(Outcome::new(Status::SUCCESS))
            }
        };
        match ended {
            Ok(()) => Progress::More,
            Err(outcome) => Progress::Finished(outcome),
        }
    }

    /// Bytes of the source that are left, at most `limit`.
    #[inline]
    fn piece(&self, limit: usize) -> usize {
        (u64::from(self.descriptor.size) - self.done).min(limit as u64) as usize
    }

    #[inline]
    fn source(&self) -> u64 {
        self.descriptor.source.wrapping_add(self.done)
    }

    #[inline]
    fn destination(&self) -> u64 {
        self.descriptor.destination.wrapping_add(self.done)
    }

    /// `len` more bytes are done; ends with success when that is all.
    #[inline]
    fn did(&mut self, len: usize) -> Result<(), Outcome> {
        self.done += len as u64;
        if self.done < u64::from(self.descriptor.size) { Ok(()) } else { Err(self.success()) }
    }

    #[inline]
    fn success(&self) -> Outcome {
        Outcome::new(Status::SUCCESS).with_completed(self.done as u32)
    }

    /// A fault `done` bytes into this piece.
    fn fault(&self, fault: &DmaFault, done: u64) -> Outcome {
        Outcome::fault(fault, self.done + done)
    }

    #[inline]
    fn memory_move(&mut self, bus: &mut Bus, pasid: Option<Pasid>, budget: usize) -> Progress {
        let Descriptor { source, destination, size, .. } = self.descriptor;
        let len = self.piece(budget) as u64;
        let distance = destination.wrapping_sub(source);
        // Overlapping to a higher address: from the end, and bytes completed count from there ("Memory Move", result).
        let backward = distance != 0 && distance < u64::from(size);
        let at = if backward { u64::from(size) - self.done - len } else { self.done };
        let (from, to) = (Iova::new(source).wrapping_add(at), Iova::new(destination).wrapping_add(at));
        if let Err(fault) = bus.copy(pasid, from, to, len) {
            // A piece that does not overlap itself is copied from its start; done again, it gives the same.
            let done = if backward && distance >= len { 0 } else { fault.done };
            return Progress::Finished(self.fault(&fault, done).with_result(backward.into()));
        }
        match self.did(len as usize) {
            Ok(()) => Progress::More,
            Err(outcome) => Progress::Finished(outcome),
        }
    }

    fn fill(&mut self, bus: &mut Bus, pasid: Option<Pasid>, budget: usize) -> Result<(), Outcome> {
        // Whole patterns, so that the next piece starts with the first byte of one.
        let len = self.piece(budget.next_multiple_of(8));
        let at = Iova::new(self.destination());
        bus.fill(pasid, at, len as u64, self.descriptor.source)
            .map_err(|fault| self.fault(&fault, fault.done))?;
        self.did(len)
    }

    fn compare(&mut self, context: Context) -> Result<(), Outcome> {
        let Context { bus, pasid, scratch } = context;
        let len = self.piece(PIECE);
        let first = read(bus, pasid, self.source(), &mut scratch.first[..len]);
        let (difference, fault) = if self.opcode == Opcode::Compare {
            let second = read(bus, pasid, self.destination(), &mut scratch.second[..first.bytes.len()]);
            let both = first.bytes.len().min(second.bytes.len());
            (ops::first_difference(&first.bytes[..both], &second.bytes[..both]), second.fault.or(first.fault))
        } else {
            // A piece is a whole number of patterns, so each starts with the first byte of one.
            (ops::pattern_difference(first.bytes, self.descriptor.destination, 0), first.fault)
        };
        if let Some(at) = difference {
            self.done += at as u64;
            return Err(self.compared(compare_result::DIFFERENT));
        }
        if let Some(fault) = fault {
            return Err(self.fault(&fault, fault.done));
        }
        self.did(len).map_err(|_| self.compared(compare_result::EQUAL))
    }

    fn compared(&self, result: u8) -> Outcome {
        let expected =
            self.descriptor.flags() & flag::CHECK_RESULT == 0 || self.descriptor.expected_result() == result;
        let status = if expected { Status::SUCCESS } else { Status::FALSE_PREDICATE };
        self.success().with_status(status).with_result(result)
    }

    fn dualcast(&mut self, context: Context) -> Result<(), Outcome> {
        let Context { bus, pasid, .. } = context;
        let len = self.piece(PIECE) as u64;
        let from = Iova::new(self.source());
        let second = Iova::new(self.descriptor.destination2()).wrapping_add(self.done);
        let mut copy = |to, len| bus.copy(pasid, from, to, len);
        if let Err(fault) = copy(Iova::new(self.destination()), len) {
            // Both destinations hold what counts as completed.
            let done = copy(second, fault.done).map_or_else(|second| second.done, |()| fault.done);
            return Err(self.fault(&fault, done));
        }
        copy(second, len).map_err(|fault| self.fault(&fault, fault.done))?;
        self.did(len as usize)
    }

    fn crc(&mut self, context: Context) -> Result<(), Outcome> {
        let Context { bus, pasid, scratch } = context;
        let flags = self.descriptor.flags();
        if !self.seeded {
            let mut seed = self.descriptor.crc_seed().to_le_bytes();
            if flags & flag::CRC_READ_SEED != 0 {
                let at = Iova::new(self.descriptor.crc_seed_address());
                bus.read(pasid, at, &mut seed).map_err(|fault| self.fault(&fault, 0))?;
            }
            let seed = u32::from_le_bytes(seed);
            // `ops` takes and gives inverted, reflected values.
            self.carry = if flags & flag::CRC_BYPASS_INVERSION != 0 { !seed.reverse_bits() } else { seed };
            self.seeded = true;
        }
        let len = self.piece(PIECE);
        let source = read(bus, pasid, self.source(), &mut scratch.first[..len]);
        let (got, mut fault) = (source.bytes.len(), source.fault);
        let mut copied = got;
        if self.opcode == Opcode::CopyCrc
            && let Err(refused) = bus.write(pasid, Iova::new(self.destination()), source.bytes)
        {
            (copied, fault) = ((refused.done as usize).min(got), Some(refused));
        }
        let bytes = &mut scratch.first[..copied];
        if flags & flag::CRC_BYPASS_REFLECTION != 0 {
            for byte in bytes.iter_mut() {
                *byte = byte.reverse_bits();
            }
        }
        self.carry = ops::crc32c(self.carry, bytes);
        let value =
            if flags & flag::CRC_BYPASS_INVERSION != 0 { (!self.carry).reverse_bits() } else { self.carry };
        let ended = match fault {
            Some(fault) => Err(self.fault(&fault, copied as u64)),
            None => self.did(len),
        };
        ended.map_err(|outcome| outcome.with_specific([value.into(), 0]))
    }

    fn flush(&mut self, bus: &mut Bus, pasid: Option<Pasid>, budget: usize) -> Result<(), Outcome> {
        let len = self.piece(budget);
        let at = Iova::new(self.destination());
        bus.flush(pasid, at, len as u64).map_err(|fault| self.fault(&fault, fault.done))?;
        self.did(len)
    }
}
