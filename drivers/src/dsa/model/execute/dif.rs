//! The operations on protection information.

use underpass::Iova;
use underpass::accel::{Dif, DifBlock};

use super::{Context, Job, Outcome, PIECE, read};
use crate::dsa::model::check::dif_block_len;
use crate::dsa::spec::{
    DifControl, DifDestinationFlags, DifSourceFlags, DifTags, Opcode, Status, dif_result,
};
use crate::ops::{self, DifVerdict};

/// Bytes of protection information of a block.
const TUPLE: usize = 8;

impl Job {
    pub(super) fn dif(&mut self, context: Context) -> Result<(), Outcome> {
        let Context { bus, pasid, scratch } = context;
        let control = self.descriptor.dif_control();
        let block = dif_block_len(control) as usize;
        let unit = if self.opcode == Opcode::DifInsert { block } else { block + TUPLE };
        let len = self.piece(PIECE / unit * unit);
        let source = read(bus, pasid, self.source(), &mut scratch.first[..len]);

        let mut index = (self.done / unit as u64) as u32;
        let (mut blocks, mut written, mut wrong) = (0, 0, 0);
        for whole in source.bytes.chunks_exact(unit) {
            let (data, old) = whole.split_at(block);
            if let Some(&tuple) = old.first_chunk::<TUPLE>() {
                wrong = self.check_block(data, tuple, control, index);
                if wrong != 0 {
                    break;
                }
            }
            if self.opcode != Opcode::DifCheck {
                scratch.out[written..][..block].copy_from_slice(data);
                written += block;
            }
            if matches!(self.opcode, Opcode::DifInsert | Opcode::DifUpdate) {
                let new = self.new_tuple(data, old.first_chunk(), control, index);
                scratch.out[written..][..TUPLE].copy_from_slice(&new);
                written += TUPLE;
            }
            (blocks, index) = (blocks + 1, index + 1);
        }

        if written > 0 {
            let out_unit = written / blocks;
            let at = (self.done / unit as u64).wrapping_mul(out_unit as u64);
            let at = Iova::new(self.descriptor.destination).wrapping_add(at);
            if let Err(fault) = bus.write(pasid, at, &scratch.out[..written]) {
                let blocks = fault.done / out_unit as u64;
                return Err(self.at_block(self.fault(&fault, blocks * unit as u64), unit));
            }
        }
        self.done += (blocks * unit) as u64;
        if wrong != 0 {
            let outcome = self.success().with_status(Status::DIF_ERROR).with_result(wrong);
            return Err(self.at_block(outcome, unit));
        }
        if let Some(fault) = source.fault {
            return Err(self.at_block(self.fault(&fault, 0), unit));
        }
        self.did(0).map_err(|outcome| self.at_block(outcome, unit))
    }

    /// Checks one block; returns bits of `dif_result`.
    fn check_block(&self, data: &[u8], tuple: [u8; TUPLE], control: DifControl, index: u32) -> u8 {
        let flags = control.source();
        let [guard @ .., a0, a1, r0, r1, r2, r3] = tuple;
        let (app_f, ref_f) = ([a0, a1] == [0xff; 2], [r0, r1, r2, r3] == [0xff; 4]);
        let all_f = app_f && ref_f && guard == [0xff; 2];
        if flags.all_f_detect() && all_f {
            return if flags.all_f_error() { dif_result::ALL_F } else { 0 };
        }
        if flags.app_tag_f_detect() && app_f || flags.app_and_ref_tag_f_detect() && app_f && ref_f {
            return 0;
        }
        let dif = source_dif(control, self.descriptor.dif_source_tags(), flags);
        let DifVerdict { guard_bad, app_tag_bad, ref_tag_bad } = ops::dif_check(data, tuple, &dif, index);
        let bit = |bad, bit| if bad { bit } else { 0 };
        bit(guard_bad, dif_result::GUARD)
            | bit(app_tag_bad, dif_result::APP_TAG)
            | bit(ref_tag_bad, dif_result::REF_TAG)
    }

    /// The new protection information of one block, parts of which an update may take from the `old`.
    fn new_tuple(
        &self,
        data: &[u8],
        old: Option<&[u8; TUPLE]>,
        control: DifControl,
        index: u32,
    ) -> [u8; TUPLE] {
        let flags = control.destination();
        let dif = destination_dif(control, self.descriptor.dif_destination_tags(), flags);
        let mut new = ops::dif_tuple(data, &dif, index);
        if let Some(old) = old {
            let parts =
                [(flags.pass_guard(), 0..2), (flags.pass_app_tag(), 2..4), (flags.pass_ref_tag(), 4..8)];
            for (_, part) in parts.into_iter().filter(|(pass, _)| *pass) {
                new[part.clone()].copy_from_slice(&old[part]);
            }
        }
        new
    }

    /// Adds to `outcome` the tags of the block after those that it counts as completed.
    fn at_block(&self, outcome: Outcome, unit: usize) -> Outcome {
        let control = self.descriptor.dif_control();
        let index = outcome.0.handshake.completed() / unit as u32;
        let advance = |tags: DifTags, increments_app: bool, fixed_ref: bool| {
            let app = if increments_app { index as u16 } else { 0 };
            let reference = if fixed_ref { 0 } else { index };
            tags.with_app_tag(tags.app_tag().wrapping_add(app))
                .with_ref_tag(tags.ref_tag().wrapping_add(reference))
                .into_bits()
        };
        let (from, to) = (control.source(), control.destination());
        let source =
            advance(self.descriptor.dif_source_tags(), from.increment_app_tag(), from.fixed_ref_tag());
        let destination =
            advance(self.descriptor.dif_destination_tags(), to.increment_app_tag(), to.fixed_ref_tag());
        let specific = match self.opcode {
            Opcode::DifInsert => [0, destination],
            Opcode::DifUpdate => [source, destination],
            _ => [source, 0],
        };
        outcome.with_specific(specific)
    }
}

fn dif(control: DifControl, tags: DifTags) -> Dif {
    Dif {
        invert_crc_seed: control.invert_crc_seed(),
        invert_crc_result: control.invert_crc_result(),
        app_tag: tags.app_tag(),
        app_tag_mask: tags.app_tag_mask(),
        ref_tag: tags.ref_tag(),
        ..Dif::new(DifBlock::ALL[usize::from(control.block() & 3)])
    }
}

fn source_dif(control: DifControl, tags: DifTags, flags: DifSourceFlags) -> Dif {
    Dif {
        increment_app_tag: flags.increment_app_tag(),
        fixed_ref_tag: flags.fixed_ref_tag(),
        skip_guard_check: flags.skip_guard_check(),
        skip_ref_tag_check: flags.skip_ref_tag_check(),
        ..dif(control, tags)
    }
}

fn destination_dif(control: DifControl, tags: DifTags, flags: DifDestinationFlags) -> Dif {
    Dif {
        increment_app_tag: flags.increment_app_tag(),
        fixed_ref_tag: flags.fixed_ref_tag(),
        ..dif(control, tags)
    }
}
