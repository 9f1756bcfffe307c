use std::cell::Cell;
use std::sync::Mutex;

use proptest::prelude::*;

use super::super::{cap, ext_cap};
use super::*;

const WIDTHS: [Width; 4] = [Width::Bits8, Width::Bits16, Width::Bits32, Width::Bits64];

/// A function that is nothing but configuration space, and remembers what was written.
#[derive(Default)]
struct Image {
    space: Mutex<Option<ConfigSpace>>,
    writes: Mutex<Vec<(u16, Width, u32)>>,
}

impl Registers for Image {
    fn read(&self, _: usize, _: u64, _: Width) -> u64 {
        unreachable!("no BARs")
    }
    fn write(&self, _: usize, _: u64, _: Width, _: u64) {
        unreachable!("no BARs")
    }
    fn read_config(&self, offset: u16, width: Width) -> u32 {
        self.space.lock().unwrap().as_ref().unwrap().read(offset, width) as u32
    }
    fn write_config(&self, offset: u16, width: Width, value: u32) {
        self.space.lock().unwrap().as_mut().unwrap().write(offset, width, value.into());
        self.writes.lock().unwrap().push((offset, width, value));
    }
}

fn over(space: ConfigSpace) -> (Config, Arc<Image>) {
    let image = Arc::new(Image { space: Mutex::new(Some(space)), ..Image::default() });
    (Config::new(Arc::clone(&image) as Arc<dyn Registers>), image)
}

fn example() -> ConfigSpace {
    ConfigSpace::new(0x8086, 0x0b25, 0x08_80_00)
        .with_capability(cap::PCIE, &[0x92; 58], &[])
        .with_capability(cap::MSIX, &[8, 0, 0, 0x20, 0, 0, 0, 0x30, 0, 0], &[0, 0xc0])
        .with_extended(ext_cap::ATS, 1, &[0x20, 0, 0, 0], &[0, 0, 0, 0x80])
        .with_extended(ext_cap::PASID, 1, &[0, 20, 0, 0], &[0, 0, 1])
        .with_extended(ext_cap::PRI, 2, &[0; 12], &[])
}

#[test]
fn ids_and_capabilities_are_where_a_driver_looks() {
    let (config, _) = over(example());
    assert_eq!((config.vendor_id(), config.device_id(), config.class()), (0x8086, 0x0b25, 0x08_8000));
    assert_eq!(config.capabilities().collect::<Vec<_>>(), [(cap::PCIE, 0x40), (cap::MSIX, 0x7c)]);
    // Headers by hand, from the layout of 7.6.3: id, version, offset of the next.
    assert_eq!(config.read32(0x100), 0x1081_000f);
    assert_eq!(config.read32(0x108), 0x1101_001b);
    assert_eq!(config.read32(0x110), 0x0002_0013);
    let extended = [(ext_cap::ATS, 0x100), (ext_cap::PASID, 0x108), (ext_cap::PRI, 0x110)];
    assert_eq!(config.extended_capabilities().collect::<Vec<_>>(), extended);
    assert_eq!(config.capability(cap::MSIX), Some(0x7c));
    assert_eq!(config.capability(cap::MSI), None);
    assert_eq!(config.extended_capability(ext_cap::PRI), Some(0x110));
    assert_eq!(example().find_extended(ext_cap::PASID), Some(0x108));
    assert_eq!(example().find_capability(cap::MSIX), Some(0x7c));
    assert_eq!(example().find_extended(0x1e), None);
}

#[test]
fn a_function_without_capabilities_lists_none() {
    let (config, _) = over(ConfigSpace::new(1, 2, 3));
    assert_eq!(config.capabilities().count(), 0);
    assert_eq!(config.extended_capabilities().count(), 0);
}

#[test]
fn only_the_masked_bits_change() {
    let mut space = example();
    space.write(0x7e, Width::Bits16, 0xffff);
    assert_eq!(space.read(0x7e, Width::Bits16), 0xc008, "message control: enable and function mask");
    space.write(0x100, Width::Bits64, u64::MAX);
    assert_eq!(space.read(0x100, Width::Bits64), 0x8000_0020_1081_000f);
    space.write(0x10c, Width::Bits32, 0);
    assert_eq!(space.read(0x10c, Width::Bits32), 0x1400);
    space.write(0, Width::Bits32, 0);
    assert_eq!(space.read(0, Width::Bits32), 0x0b25_8086);
}

#[test]
fn bus_mastering_is_off_at_reset_and_can_be_switched() {
    let mut space = example();
    assert!(!space.bus_master());
    space.write(COMMAND, Width::Bits16, 0xffff);
    assert_eq!(space.read(COMMAND, Width::Bits16), 6);
    assert!(space.bus_master());
}

/// As VFIO shows one that was unplugged: what it keeps copies of, and nothing else.
#[test]
fn a_function_that_left_the_bus_does_not_answer_though_its_ids_do() {
    let (config, image) = over(example());
    assert!(config.answers());
    image.space.lock().unwrap().as_mut().unwrap().put(COMMAND, &[0xff; 4]);
    assert!(!config.answers());
    assert_eq!(config.vendor_id(), 0x8086);
}

#[test]
fn memory_decoding_stays_on_whatever_is_written() {
    let mut space = example();
    space.enable_memory();
    let (config, image) = over(space);
    config.write8(COMMAND, 0);
    config.write16(COMMAND, 0x4);
    assert_eq!(config.read16(COMMAND), 6, "the write's other bits count");
    config.write32(COMMAND, 0);
    config.write8(COMMAND + 1, 0);
    assert_eq!(config.read16(COMMAND), 2);
    let writes = image.writes.lock().unwrap();
    assert!(writes.iter().all(|&(at, _, value)| at != COMMAND || value & 2 != 0), "{writes:?}");
}

#[test]
fn the_function_stays_awake_whatever_is_written() {
    let space =
        ConfigSpace::new(1, 2, 3).with_capability(cap::POWER_MANAGEMENT, &[0; 6], &[0, 0, 0xff, 0xff]);
    let (config, image) = over(space);
    let at = config.capability(cap::POWER_MANAGEMENT).unwrap();
    config.write16(at + 4, 0x8103);
    assert_eq!(config.read16(at + 4), 0x8100, "the write's other bits count");
    config.write8(at + 4, 2);
    config.write32(at + 4, 1);
    config.write32(at + 2, 3 << 16);
    config.write16(at + 3, 1 << 8);
    config.write8(at + 5, 3);
    assert_eq!(config.read16(at + 4), 0x300);
    config.write8(at + 6, 3);
    let writes = image.writes.lock().unwrap();
    let state = |&(offset, _, value): &(u16, Width, u32)| match at + 4 - offset.min(at + 4) {
        0 if offset > at + 4 => 0,
        bytes => value >> (8 * bytes) & 3,
    };
    assert!(writes.iter().all(|write| state(write) == 0), "{writes:x?}");
}

#[test]
fn the_rest_of_the_header_is_not_the_drivers_to_write() {
    let (config, image) = over(example());
    config.write32(0x00, 0);
    config.write8(0x03, 0);
    config.write32(0x02, 0); // misaligned, and would reach the command register
    config.write32(0x06, 0);
    config.write32(0x10, 0xffff_ffff);
    config.write8(0x3f, 1);
    assert_eq!(*image.writes.lock().unwrap(), []);
    config.write16(STATUS, 0xf900);
    config.write32(0x40, 0);
    assert_eq!(*image.writes.lock().unwrap(), [(6, Width::Bits16, 0xf900), (0x40, Width::Bits32, 0)]);
}

#[test]
fn past_the_end_reads_as_ones_and_is_not_written() {
    let (config, image) = over(example());
    assert_eq!((config.read32(0xffd), config.read16(0xfff), config.read8(0x1000)), (u32::MAX, 0xffff, 0xff));
    assert_eq!((config.read32(0xffc), config.read32(u16::MAX)), (0, u32::MAX));
    config.write32(0xffe, 0);
    config.write8(u16::MAX, 0);
    assert_eq!(*image.writes.lock().unwrap(), []);
    let mut space = example();
    assert_eq!(space.read(0xffe, Width::Bits32), 0xffff_0000);
    space.write(0xffe, Width::Bits64, 0);
    space.write(u16::MAX, Width::Bits64, 0);
}

/// Reads 32 bits of a space with these at these places.
fn sparse(words: &[(u16, u32)]) -> impl Fn(u16) -> u32 {
    move |offset| words.iter().find(|(at, _)| *at == offset).map_or(0, |(_, word)| *word)
}

const LISTED: (u16, u32) = (COMMAND, (STATUS_CAPABILITIES as u32) << 16);

#[test]
fn a_walk_ends_where_a_pointer_leads_back_or_out() {
    let walk = |words: &[(u16, u32)]| capabilities(sparse(words)).map(|(_, at)| at).collect::<Vec<_>>();
    assert_eq!(walk(&[(CAPABILITIES, 0x40), (0x40, 0x11)]), [], "the status bit says that there is no list");
    assert_eq!(walk(&[LISTED, (CAPABILITIES, 0x40), (0x40, 0x4011)]), [0x40], "to itself");
    let ring = [LISTED, (CAPABILITIES, 0x40), (0x40, 0x5001), (0x50, 0x6005), (0x60, 0x5009)];
    assert_eq!(walk(&ring), [0x40, 0x50, 0x60]);
    assert_eq!(walk(&[LISTED, (CAPABILITIES, 0x3c), (0x3c, 0x4011)]), [], "into the header");
    assert_eq!(walk(&[LISTED, (CAPABILITIES, 0x43), (0x40, 0x01)]), [0x40], "reserved bits are masked");
    assert_eq!(walk(&[LISTED, (CAPABILITIES, 0xfc), (0xfc, 0x01)]), [0xfc], "the last place there is");
    assert_eq!(walk(&[LISTED, (CAPABILITIES, 0x40), (0x40, 0xffff_ffff)]), [], "a device that is gone");
}

#[test]
fn an_extended_walk_ends_where_a_pointer_leads_back_or_out() {
    let walk =
        |words: &[(u16, u32)]| extended_capabilities(sparse(words)).map(|(_, at)| at).collect::<Vec<_>>();
    assert_eq!(walk(&[(0x100, 0x1001_000f)]), [0x100], "to itself");
    assert_eq!(walk(&[(0x100, 0x2001_000f), (0x200, 0x1001_0013)]), [0x100, 0x200]);
    assert_eq!(walk(&[(0x100, 0x0401_000f)]), [0x100], "into the first 256 bytes");
    assert_eq!(
        walk(&[(0x100, 0x2031_000f), (0x200, 0x0001_0013)]),
        [0x100, 0x200],
        "reserved bits are masked"
    );
    assert_eq!(walk(&[(0x100, 0xfff1_000f), (0xffc, 0x0001_001b)]), [0x100, 0xffc]);
    assert_eq!(walk(&[(0x100, u32::MAX)]), []);
}

#[test]
fn the_longest_list_there_can_be_is_walked_to_its_end() {
    let read = |offset: u16| match offset {
        COMMAND => LISTED.1,
        CAPABILITIES => 0x40,
        _ => 0x05 | u32::from(offset + 4) << 8,
    };
    assert_eq!(capabilities(read).count(), 48);
    assert_eq!(extended_capabilities(|offset| 0x1_000f | u32::from(offset + 4) << 20).count(), 960);
}

#[test]
#[should_panic(expected = "no room for capability 0x9")]
fn a_model_with_too_many_capabilities_is_told() {
    let _ = (0..5).fold(example(), |space, _| space.with_capability(cap::VENDOR, &[0; 38], &[]));
}

proptest! {
    #[test]
    fn any_bytes_are_walked_to_an_end(bytes in proptest::collection::vec(any::<u8>(), 4096), listed: bool) {
        let mut space = ConfigSpace::new(0, 0, 0);
        space.bytes.copy_from_slice(&bytes);
        space.bytes[usize::from(STATUS)] = if listed { 0x10 } else { 0 };
        let (config, _) = over(space);
        let places: Vec<_> = config.capabilities().map(|(_, at)| at).collect();
        prop_assert!(places.len() <= 48 && (listed || places.is_empty()));
        prop_assert!(places.iter().all(|at| (0x40..0x100).contains(at) && at % 4 == 0));
        let places: Vec<_> = config.extended_capabilities().map(|(_, at)| at).collect();
        prop_assert!(places.len() <= 960);
        prop_assert!(places.iter().all(|at| (0x100..0x1000).contains(at) && at % 4 == 0));
    }

    /// A device may answer the same read differently each time.
    #[test]
    fn answers_that_change_are_walked_to_an_end(answers in proptest::collection::vec(any::<u32>(), 1..200)) {
        let n = Cell::new(0);
        let read = |_| {
            n.set(n.get() + 1);
            answers[n.get() % answers.len()] | LISTED.1
        };
        prop_assert!(capabilities(read).count() <= 48);
        prop_assert!(extended_capabilities(read).count() <= 960);
    }

    #[test]
    fn a_write_changes_exactly_the_writable_bits(
        masks in proptest::collection::vec(any::<u8>(), 32),
        old in proptest::collection::vec(any::<u8>(), 32),
        (offset, width, value) in (0_u16..40, proptest::sample::select(&WIDTHS[..]), any::<u64>()),
    ) {
        let mut space = ConfigSpace::new(0, 0, 0).with_extended(ext_cap::ATS, 1, &old, &masks);
        space.write(0x104 + offset, width, value);
        for n in 0..32_u16 {
            let (was, mask) = (old[usize::from(n)], masks[usize::from(n)]);
            let written = n >= offset && u64::from(n - offset) < width.bytes();
            let new = if written { value.to_le_bytes()[usize::from(n - offset)] } else { was };
            prop_assert_eq!(space.read(0x104 + n, Width::Bits8) as u8, was & !mask | new & mask);
        }
    }
}
