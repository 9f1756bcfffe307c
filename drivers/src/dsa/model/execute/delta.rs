//! Create and apply delta record.

use underpass::Iova;

use super::{Context, Job, Outcome, PIECE, read};
use crate::dsa::spec::{DELTA_ENTRY, Status, delta_result, flag};
use crate::ops;

impl Job {
    /// `carry` counts the bytes of the record.
    pub(super) fn create_delta(&mut self, context: Context) -> Result<(), Outcome> {
        let Context { bus, pasid, scratch } = context;
        let len = self.piece(PIECE);
        let original = read(bus, pasid, self.source(), &mut scratch.first[..len]);
        let modified = read(bus, pasid, self.destination(), &mut scratch.second[..original.bytes.len()]);
        let fault = modified.fault.or(original.fault);
        let both = modified.bytes.len() / 8 * 8;
        let room = (self.descriptor.max_delta_size() - self.carry) as usize;
        let room = room.min(scratch.out.len());
        let delta = ops::create_delta(
            &original.bytes[..both],
            &modified.bytes[..both],
            (self.done / 8) as usize,
            &mut scratch.out[..room],
        );
        let written = &scratch.out[..delta.written];
        let at = Iova::new(self.descriptor.delta_record()).wrapping_add(self.carry.into());
        if let Err(refused) = bus.write(pasid, at, written) {
            // What the record holds ends with its last whole entry.
            let entries = refused.done as u32 / DELTA_ENTRY;
            let done = covered(&written[..(entries * DELTA_ENTRY) as usize], self.done);
            self.carry += entries * DELTA_ENTRY;
            return Err(self.delta(self.fault(&refused, done)));
        }
        self.carry += delta.written as u32;
        if delta.overflow {
            self.done += covered(written, self.done);
            return Err(self.created(delta_result::OVERFLOW));
        }
        if let Some(fault) = fault {
            return Err(self.delta(self.fault(&fault, both as u64)));
        }
        self.did(len).map_err(|_| {
            self.created(if self.carry == 0 { delta_result::EQUAL } else { delta_result::COMPLETE })
        })
    }

    fn created(&self, result: u8) -> Outcome {
        let expected = self.descriptor.flags() & flag::CHECK_RESULT == 0
            || self.descriptor.expected_result_mask() & 1 << result != 0;
        let status = if expected { Status::SUCCESS } else { Status::FALSE_PREDICATE };
        self.delta(self.success().with_status(status).with_result(result))
    }

    fn delta(&self, outcome: Outcome) -> Outcome {
        outcome.with_specific([self.carry.into(), 0])
    }

    /// `done` counts the bytes of the record, `carry` is the lowest unit that may come.
    pub(super) fn apply_delta(&mut self, context: Context) -> Result<(), Outcome> {
        let Context { bus, pasid, scratch } = context;
        let left = u64::from(self.descriptor.delta_size()) - self.done;
        let len = left.min((PIECE as u64) / u64::from(DELTA_ENTRY) * u64::from(DELTA_ENTRY));
        let record = read(bus, pasid, self.source(), &mut scratch.first[..len as usize]);
        let (entries, _) = record.bytes.as_chunks::<{ DELTA_ENTRY as usize }>();
        for [low, high, new @ ..] in entries {
            let unit = u32::from(u16::from_le_bytes([*low, *high]));
            if unit < self.carry {
                return Err(self.success().with_status(Status::DELTA_ORDER));
            }
            if unit * 8 >= self.descriptor.size {
                return Err(self.success().with_status(Status::DELTA_OFFSET));
            }
            let at = Iova::new(self.descriptor.destination).wrapping_add((unit * 8).into());
            bus.write(pasid, at, new).map_err(|fault| self.fault(&fault, 0))?;
            self.carry = unit + 1;
            self.done += u64::from(DELTA_ENTRY);
        }
        if let Some(fault) = record.fault {
            return Err(self.fault(&fault, 0));
        }
        if self.done < u64::from(self.descriptor.delta_size()) { Ok(()) } else { Err(self.success()) }
    }
}

/// How many bytes of the source beyond `done` a record covers: up to the unit of its last entry, and with it.
fn covered(record: &[u8], done: u64) -> u64 {
    match record.as_chunks::<{ DELTA_ENTRY as usize }>().0 {
        [.., [low, high, ..]] => (u64::from(u16::from_le_bytes([*low, *high])) + 1) * 8 - done,
        [] => 0,
    }
}
