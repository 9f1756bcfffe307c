//! What a descriptor must be like before anything of it is done (the specification, chapter "Descriptor Formats" and
//! section "Completion Status Codes").

use std::sync::atomic::Ordering;

use super::device::Device;
use super::engine::Origin;
use super::spec::{
    CompletionRecord, DELTA_ENTRY, DELTA_MAX_TRANSFER, DELTA_MIN_SIZE, Descriptor, Opcode, Status, flag,
};
use crate::dsa::spec::DifControl;

/// Why a descriptor is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) status: Status,
    pub(super) invalid_flags: u32,
}

impl From<Status> for Refusal {
    fn from(status: Status) -> Self {
        Self { status, invalid_flags: 0 }
    }
}

/// Flags of every operation. Those that say where writes go are hints, which this device takes.
const COMMON: u32 = flag::FENCE
    | flag::COMPLETION_ADDRESS_VALID
    | flag::REQUEST_COMPLETION
    | flag::REQUEST_INTERRUPT
    | flag::COMPLETION_STEERING
    | flag::COMPLETION_TC;
/// Flags of operations that write.
const WRITES: u32 =
    flag::CACHE_CONTROL | flag::STRICT_ORDERING | flag::DESTINATION_READBACK | flag::DESTINATION_STEERING;
const CRC: u32 = flag::CRC_READ_SEED | flag::CRC_BYPASS_INVERSION | flag::CRC_BYPASS_REFLECTION;
const A1: u32 = flag::ADDRESS1_TC;
const A2: u32 = flag::ADDRESS2_TC;
const A3: u32 = flag::ADDRESS3_TC;

/// The flags that an operation may have on this device, which can not block on a fault or read back on a drain.
fn allowed_flags(opcode: Opcode) -> u32 {
    match opcode {
        Opcode::NoOp => COMMON,
        Opcode::Batch => COMMON & !flag::FENCE | A1,
        Opcode::Drain => COMMON & !flag::FENCE | flag::DRAIN_SUPPRESS_A | flag::DRAIN_SUPPRESS_B,
        Opcode::MemoryMove
        | Opcode::ApplyDelta
        | Opcode::DifInsert
        | Opcode::DifStrip
        | Opcode::DifUpdate => COMMON | WRITES | A1 | A2,
        Opcode::Fill => COMMON | WRITES | A2,
        Opcode::Compare => COMMON | flag::CHECK_RESULT | A1 | A2,
        Opcode::ComparePattern => COMMON | flag::CHECK_RESULT | A1,
        Opcode::CreateDelta => COMMON | WRITES | flag::CHECK_RESULT | A1 | A2 | A3,
        Opcode::Dualcast => COMMON | WRITES | A1 | A2 | A3 | flag::DUALCAST_STEERING2,
        Opcode::Crc => COMMON | A1 | A3 | CRC,
        Opcode::CopyCrc => COMMON | WRITES | A1 | A2 | A3 | CRC,
        Opcode::DifCheck => COMMON | A1,
        Opcode::CacheFlush => COMMON | flag::CACHE_CONTROL | A2,
    }
}

/// Whether the completion record can be written at all: if not, whatever is wrong goes to SWERR.
#[inline]
pub(super) fn has_record(descriptor: &Descriptor) -> bool {
    descriptor.flags() & flag::COMPLETION_ADDRESS_VALID != 0
        && descriptor.completion.is_multiple_of(size_of::<CompletionRecord>() as u64)
}

/// Checks a descriptor and returns its operation.
#[inline]
pub(super) fn check(device: &Device, origin: &Origin, descriptor: &Descriptor) -> Result<Opcode, Refusal> {
    let flags = descriptor.flags();
    let opcode = Opcode::from_code(descriptor.opcode())
        .filter(|opcode| device.profile.operations & origin.operations & opcode.bit() != 0)
        .filter(|opcode| !origin.in_batch || !matches!(opcode, Opcode::Batch | Opcode::Drain))
        .ok_or(Status::BAD_OPCODE)?;
    let mut allowed = allowed_flags(opcode);
    if flags & flag::COMPLETION_ADDRESS_VALID == 0 {
        allowed &= !flag::REQUEST_COMPLETION;
    }
    if !origin.privileged && !device.user_interrupts.load(Ordering::Relaxed) {
        allowed &= !flag::REQUEST_INTERRUPT;
    }
    if flags & !allowed != 0 {
        return Err(Refusal { status: Status::INVALID_FLAGS, invalid_flags: flags & !allowed });
    }
    let require = |holds: bool, status: Status| if holds { Ok(()) } else { Err(Refusal::from(status)) };
    require(
        flags & flag::COMPLETION_ADDRESS_VALID == 0 || has_record(descriptor),
        Status::COMPLETION_ALIGNMENT,
    )?;
    require(descriptor.context.reserved() == 0 && descriptor.reserved == 0, Status::RESERVED_NOT_ZERO)?;
    require(!origin.privileged || device.functions().privileged, Status::PRIVILEGE)?;
    if flags & flag::REQUEST_INTERRUPT != 0 {
        let handle = descriptor.interrupt_handle;
        require(
            !origin.ims && device.may_interrupt(handle, origin.pasid_number()),
            Status::INTERRUPT_HANDLE,
        )?;
    }
    require(reserved_is_zero(opcode, descriptor), Status::RESERVED_NOT_ZERO)?;
    match opcode {
        Opcode::NoOp | Opcode::Drain => Ok(()),
        Opcode::Batch => {
            let most = 1 << origin.settings.max_batch_shift();
            require((2..=most).contains(&descriptor.size), Status::DESCRIPTOR_COUNT)?;
            require(descriptor.source.is_multiple_of(64), Status::LIST_ALIGNMENT)
        }
        _ => {
            let most = 1_u32 << origin.settings.max_transfer_shift();
            require((1..=most).contains(&descriptor.size), Status::TRANSFER_SIZE)?;
            operation(device, opcode, descriptor)
        }
    }?;
    Ok(opcode)
}

/// Whether the fields that the operation does not have are zero.
fn reserved_is_zero(opcode: Opcode, descriptor: &Descriptor) -> bool {
    let &Descriptor { source, destination, size, specific: [first, second, third], .. } = descriptor;
    match opcode {
        Opcode::NoOp | Opcode::Drain => {
            source == 0 && destination == 0 && size == 0 && first == 0 && second == 0 && third == 0
        }
        Opcode::Batch => destination == 0 && first == 0 && second == 0 && third == 0,
        // The upper half of a 16-byte pattern is from version 2 on.
        Opcode::MemoryMove | Opcode::Fill => first == 0 && second == 0 && third == 0,
        Opcode::Compare | Opcode::ComparePattern => first <= 0xff && second == 0 && third == 0,
        Opcode::CreateDelta => second >> 32 == 0 && third <= 0xff,
        Opcode::ApplyDelta => first >> 32 == 0 && second == 0 && third == 0,
        Opcode::Dualcast => second == 0 && third == 0,
        Opcode::Crc | Opcode::CopyCrc => {
            let seed_address = descriptor.flags() & flag::CRC_READ_SEED != 0;
            first >> 32 == 0
                && (second == 0 || seed_address)
                && third == 0
                && (opcode != Opcode::Crc || destination == 0)
        }
        Opcode::DifCheck | Opcode::DifStrip => {
            let control = descriptor.dif_control();
            dif_reserved_is_zero(control) && control.destination().into_bits() == 0 && third == 0
        }
        Opcode::DifInsert => {
            let control = descriptor.dif_control();
            let to = control.destination();
            dif_reserved_is_zero(control)
                && control.source().into_bits() == 0
                && !(to.pass_guard() || to.pass_app_tag() || to.pass_ref_tag())
                && second == 0
        }
        Opcode::DifUpdate => dif_reserved_is_zero(descriptor.dif_control()),
        Opcode::CacheFlush => source == 0 && first == 0 && second == 0 && third == 0,
    }
}

fn dif_reserved_is_zero(control: DifControl) -> bool {
    control.reserved() == 0 && control.reserved_flags() == 0 && control.destination().reserved() == 0
}

/// What each operation asks of its sizes and addresses.
fn operation(device: &Device, opcode: Opcode, descriptor: &Descriptor) -> Result<(), Refusal> {
    let require = |holds: bool, status: Status| if holds { Ok(()) } else { Err(Refusal::from(status)) };
    let (source, destination, size) = (descriptor.source, descriptor.destination, descriptor.size);
    match opcode {
        Opcode::MemoryMove => require(
            device.profile.overlapping_copy || !overlap(source, size, destination, size),
            Status::OVERLAP,
        ),
        Opcode::Dualcast => {
            let second = descriptor.destination2();
            require((destination ^ second).is_multiple_of(0x1000), Status::DUALCAST_ALIGNMENT)?;
            require(
                !overlap(source, size, destination, size)
                    && !overlap(source, size, second, size)
                    && !overlap(destination, size, second, size),
                Status::OVERLAP,
            )
        }
        Opcode::CreateDelta => {
            require((source | destination | u64::from(size)).is_multiple_of(8), Status::ADDRESS_ALIGNMENT)?;
            require(size <= DELTA_MAX_TRANSFER, Status::TRANSFER_SIZE)?;
            let (record, most) = (descriptor.delta_record(), descriptor.max_delta_size());
            require(most >= DELTA_MIN_SIZE && most.is_multiple_of(DELTA_ENTRY), Status::DELTA_SIZE)?;
            require(
                !overlap(source, size, record, most) && !overlap(destination, size, record, most),
                Status::OVERLAP,
            )
        }
        Opcode::ApplyDelta => {
            require((destination | u64::from(size)).is_multiple_of(8), Status::ADDRESS_ALIGNMENT)?;
            require(size <= DELTA_MAX_TRANSFER, Status::TRANSFER_SIZE)?;
            let record = descriptor.delta_size();
            require(record.is_multiple_of(DELTA_ENTRY), Status::DELTA_SIZE)?;
            require(!overlap(source, record, destination, size), Status::OVERLAP)
        }
        Opcode::Crc | Opcode::CopyCrc => {
            require(descriptor.crc_seed_address().is_multiple_of(4), Status::ADDRESS_ALIGNMENT)?;
            let copies = opcode == Opcode::CopyCrc;
            require(!copies || !overlap(source, size, destination, size), Status::OVERLAP)
        }
        Opcode::DifCheck | Opcode::DifInsert | Opcode::DifStrip | Opcode::DifUpdate => {
            let block = dif_block_len(descriptor.dif_control());
            let (unit, written) = match opcode {
                Opcode::DifInsert => (block, block + 8),
                Opcode::DifStrip => (block + 8, block),
                _ => (block + 8, block + 8),
            };
            require(size.is_multiple_of(unit), Status::TRANSFER_SIZE)?;
            let written = u64::from(size / unit) * u64::from(written);
            require(
                opcode == Opcode::DifCheck || !overlap_long(source, size.into(), destination, written),
                Status::OVERLAP,
            )
        }
        _ => Ok(()),
    }
}

/// Bytes of data in a block.
pub(super) fn dif_block_len(control: DifControl) -> u32 {
    [512, 520, 4096, 4104][usize::from(control.block() & 3)]
}

/// Whether two buffers share bytes.
pub(super) fn overlap(a: u64, a_len: u32, b: u64, b_len: u32) -> bool {
    overlap_long(a, a_len.into(), b, b_len.into())
}

fn overlap_long(a: u64, a_len: u64, b: u64, b_len: u64) -> bool {
    // Differences, because a buffer may run past the end of the address space.
    b.wrapping_sub(a) < a_len || a.wrapping_sub(b) < b_len
}
