use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::worker::panic_message;

const WIDTHS: [Width; 4] = [Width::Bits8, Width::Bits16, Width::Bits32, Width::Bits64];

/// Memory in place of a device's registers.
#[repr(align(64))]
struct Registers([AtomicU64; 32]);

fn mmio() -> (Bar, Arc<Registers>) {
    let registers = Arc::new(Registers([const { AtomicU64::new(0) }; 32]));
    let ptr = NonNull::from(&registers.0).cast();
    // SAFETY: the bytes live as long as the Arc, are atomics (so writable through it), and this one thread uses them.
    let bar = unsafe { Bar::from_mmio(ptr, 256, registers.clone()) };
    (bar, registers)
}

/// Calls `access`, which must panic, and returns what it said.
fn refusal(access: impl FnOnce()) -> String {
    panic_message(&*catch_unwind(AssertUnwindSafe(access)).expect_err("the access was let through"))
}

fn bytes_up_from(first: u8) -> [u8; 64] {
    std::array::from_fn(|n| first + n as u8)
}

#[test]
fn accesses_of_every_width_are_little_endian_parts_of_one_word() {
    for bar in [Bar::memory(256), mmio().0] {
        bar.write64(8, 0x8877_6655_4433_2211);
        assert_eq!(bar.read8(9), 0x22, "{bar:?}");
        assert_eq!(bar.read16(10), 0x4433, "{bar:?}");
        assert_eq!(bar.read32(12), 0x8877_6655, "{bar:?}");
        bar.write8(15, 0xaa);
        bar.write16(12, 0xbbbb);
        bar.write32(8, 0xcccc_cccc);
        assert_eq!(bar.read64(8), 0xaa77_bbbb_cccc_cccc, "{bar:?}");
        assert_eq!((bar.read64(0), bar.read64(16)), (0, 0), "{bar:?}: neighbours are untouched");
    }
}

/// Registers that are a call each, and what was asked of them.
#[derive(Default)]
struct Calls(std::sync::Mutex<Vec<Call>>);

/// BAR, offset, width, and what was written.
type Call = (usize, u64, Width, Option<u64>);

impl crate::pci::Registers for Calls {
    fn read(&self, bar: usize, offset: u64, width: Width) -> u64 {
        self.0.lock().unwrap().push((bar, offset, width, None));
        0x1111_2222_3333_4444
    }
    fn write(&self, bar: usize, offset: u64, width: Width, value: u64) {
        self.0.lock().unwrap().push((bar, offset, width, Some(value)));
    }
    fn read_config(&self, _: u16, _: Width) -> u32 {
        unreachable!("no configuration space")
    }
    fn write_config(&self, _: u16, _: Width, _: u32) {
        unreachable!("no configuration space")
    }
}

#[test]
fn a_bar_of_which_parts_are_mapped_reaches_each_place_its_way() {
    let (registers, calls) =
        (Arc::new(Registers([const { AtomicU64::new(0) }; 32])), Arc::new(Calls::default()));
    let ptr = NonNull::from(&registers.0).cast::<u8>();
    // SAFETY: as in mmio() above, the first half; 128 is a multiple of 64.
    let first = unsafe { Area::new(128, ptr, 128, registers.clone()) };
    // SAFETY: there are 256 bytes.
    let half = unsafe { ptr.add(128) };
    // SAFETY: likewise, the second half.
    let second = unsafe { Area::new(512, half, 128, registers.clone()) };
    let bar = Bar::device(vec![first, second], calls.clone(), 3, 1024).named("BAR 3");
    let asked = || std::mem::take(&mut *calls.0.lock().unwrap());
    bar.write64(128, 1);
    bar.write64(248, 2);
    bar.write32(512, 3);
    assert_eq!((bar.read64(128), bar.read64(248), bar.read32(512)), (1, 2, 3));
    assert_eq!(asked(), []);
    let word = |n: usize| registers.0[n].load(Ordering::Relaxed);
    assert_eq!((word(0), word(15), word(16)), (1, 2, 3));
    for beside in [120, 256, 504, 640, 1016] {
        assert_eq!(bar.read16(beside), 0x4444);
        bar.write64(beside, beside);
        assert_eq!(asked(), [(3, beside, Width::Bits16, None), (3, beside, Width::Bits64, Some(beside))]);
    }
    // A window that is mapped whole has no way to the calls; others keep both.
    let (inside, across) = (bar.window(512, 128).unwrap(), bar.window(64, 128).unwrap());
    assert!(matches!(inside.target, Target::Mmio { .. }) && matches!(across.target, Target::Parts { .. }));
    inside.write64(120, 7);
    assert_eq!((word(31), inside.read64(120), inside.window(64, 64).unwrap().read64(56)), (7, 7, 7));
    across.write64(64, 8);
    assert_eq!((word(0), asked()), (8, vec![]));
    assert_eq!(across.read32(0), 0x3333_4444);
    assert_eq!(asked(), [(3, 64, Width::Bits32, None)]);
    assert!(refusal(|| _ = inside.read64(128)).contains("outside"));
    // A descriptor is one write, or none.
    assert_eq!(across.can_post64().unwrap_err().kind(), ErrorKind::Unsupported);
    assert_eq!(inside.can_post64().is_ok(), cpu_has_movdir64b());
    assert!(refusal(|| across.post64(0, &[0; 64])).contains("can_post64"));
    assert_eq!(asked(), []);
}

#[test]
fn narrow_writes_of_several_threads_to_one_word_do_not_undo_each_other() {
    let bar = Bar::memory(64);
    std::thread::scope(|scope| {
        for lane in 0..8_u64 {
            let bar = bar.clone();
            scope.spawn(move || {
                for value in 0..=200 {
                    bar.write8(lane, value);
                    assert_eq!(bar.read8(lane), value, "lane {lane}");
                }
            });
        }
    });
    assert_eq!(bar.read64(0), 0xc8c8_c8c8_c8c8_c8c8);
}

#[test]
fn a_post_lands_whole_and_nowhere_else() {
    let memory = Bar::memory(256);
    let (mmio, _registers) = mmio();
    for bar in [memory, mmio] {
        if let Err(error) = bar.can_post64() {
            // A CPU without the instruction: the error is what there is to test.
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            assert!(error.to_string().contains("MOVDIR64B"), "{error}");
            assert!(refusal(|| bar.post64(64, &[0; 64])).contains("can_post64"));
            continue;
        }
        let data = bytes_up_from(1);
        bar.post64(64, &data);
        let seen: Vec<u8> = (64..128).map(|at| bar.read8(at)).collect();
        assert_eq!(seen, data, "{bar:?}");
        let others = (0..64).chain(128..256);
        assert!(others.map(|at| bar.read8(at)).all(|byte| byte == 0), "{bar:?}");
    }
}

#[test]
fn a_post_from_an_unaligned_descriptor_is_the_same() {
    let (bar, _registers) = mmio();
    if bar.can_post64().is_ok() {
        let space: [u8; 65] = std::array::from_fn(|n| n as u8);
        bar.post64(0, space[1..].try_into().unwrap());
        assert_eq!(bar.read64(0), 0x0807_0605_0403_0201);
        assert_eq!(bar.read64(56), 0x403f_3e3d_3c3b_3a39);
    }
}

#[test]
fn a_post_on_memory_publishes_its_words_with_the_last() {
    let bar = Bar::memory(64);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 1..=1000_u64 {
                let mut data = [0; 64];
                data.as_chunks_mut::<8>().0.fill(round.to_le_bytes());
                bar.post64(0, &data);
            }
        });
        loop {
            let last = bar.read64(56);
            assert!(bar.read64(0) >= last, "the first word came after the last");
            if last == 1000 {
                break;
            }
        }
    });
}

#[test]
fn an_enqueue_is_taken_by_memory_and_refused_by_mmio() {
    let memory = Bar::memory(64);
    assert!(memory.enqueue64(0, &bytes_up_from(0)).unwrap());
    assert_eq!(memory.read64(0), 0x0706_0504_0302_0100);
    let (mmio, _registers) = mmio();
    let error = mmio.enqueue64(0, &[0; 64]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("MSR"), "{error}");
}

#[test]
fn a_window_outside_is_an_error_that_names_bar_offset_and_length() {
    let bar = Bar::memory(0x1000).named("BAR 2 of soft:test");
    for (offset, len) in [(0xfc1, 0x40), (0x1000, 1), (0, 0x1001), (u64::MAX, 2), (2, u64::MAX), (0x10, 0)] {
        let error = bar.window(offset, len).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Device);
        let text = error.to_string();
        for part in ["BAR 2 of soft:test", &format!("{offset:#x}"), &format!("{len:#x}"), "0x1000"] {
            assert!(text.contains(part), "{text} lacks {part}");
        }
    }
    assert_eq!(bar.window(0, 0x1000).unwrap().len(), 0x1000);
}

#[test]
fn windows_nest_and_end_where_they_say() {
    for bar in [Bar::memory(256), mmio().0] {
        let inner = bar.window(64, 128).unwrap().window(16, 8).unwrap();
        inner.write64(0, 42);
        assert_eq!(bar.read64(80), 42);
        assert!(refusal(|| inner.write8(8, 0)).contains("outside"));
        assert!(inner.window(0, 9).is_err(), "the rest of the BAR is not reachable from a window");
    }
}

#[test]
fn what_counts_for_alignment_is_the_place_in_the_bar() {
    let odd = Bar::memory(64).window(4, 16).unwrap();
    odd.write32(0, 7);
    assert!(refusal(|| odd.write64(0, 7)).contains("misaligned"));
    odd.write64(4, 9);
    assert_eq!(odd.read32(4), 9);
}

#[test]
fn mmio_stays_mapped_as_long_as_any_window_of_it() {
    let (bar, registers) = mmio();
    let mapping = Arc::downgrade(&registers);
    drop(registers);
    let window = bar.window(0, 8).unwrap();
    drop(bar);
    window.write64(0, 1);
    assert!(mapping.upgrade().is_some());
    drop(window);
    assert!(mapping.upgrade().is_none());
}

proptest! {
    #[test]
    fn an_access_succeeds_if_and_only_if_it_is_aligned_and_inside(
        (start, len) in (0_u64..256).prop_flat_map(|start| (Just(start), 1..=256 - start)),
        offset in prop_oneof![0_u64..300, any::<u64>()],
        width in proptest::sample::select(&WIDTHS[..]),
    ) {
        let end = u128::from(offset) + u128::from(width.bytes());
        let fits = end <= u128::from(len) && (u128::from(start) + u128::from(offset)) % u128::from(width.bytes()) == 0;
        for bar in [Bar::memory(256), mmio().0] {
            let bar = bar.window(start, len).unwrap();
            let read = catch_unwind(AssertUnwindSafe(|| bar.read(offset, width))).is_ok();
            let write = catch_unwind(AssertUnwindSafe(|| bar.write(offset, width, u64::MAX))).is_ok();
            prop_assert_eq!((read, write), (fits, fits));
        }
    }

    #[test]
    fn memory_behaves_as_an_array_of_bytes(
        accesses in proptest::collection::vec((0_u64..16, proptest::sample::select(&WIDTHS[..]), any::<u64>()), 1..50),
    ) {
        let bar = Bar::memory(64);
        let mut array = [0_u8; 64];
        for (slot, width, value) in accesses {
            let (offset, bytes) = (slot * 8 / width.bytes() * width.bytes() % 64, width.bytes() as usize);
            array[offset as usize..][..bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
            bar.write(offset, width, value & ones(width));
            let seen: Vec<u8> = (0..64).map(|at| bar.read8(at)).collect();
            prop_assert_eq!(&seen, &array);
        }
    }
}
