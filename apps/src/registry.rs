//! Which devices the commands open.
//!
//! This module holds an application's one `unsafe` call: it makes the token that stands for the user's word, given by
//! `--allow-unsafe-noiommu`. What makes it sound is that nobody else makes one, and that without the option there is none.

use underpass::iommu::UnprotectedDma;
use underpass_drivers::Registry;

/// What a user says of the devices that may be opened.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Trust {
    /// Also open PCI devices that no IOMMU holds back (VFIO's noiommu mode). Such a device can read and write all of this
    /// machine's memory: use it on a machine that you can do without
    #[arg(long)]
    allow_unsafe_noiommu: bool,
}

impl Trust {
    /// The devices that can be opened.
    pub(crate) fn registry(&self) -> Registry {
        let registry = underpass_drivers::builtin();
        if !self.allow_unsafe_noiommu {
            return registry;
        }
        // SAFETY: the user vouches for the devices that they name, by an option whose help says what is at stake; for the
        // drivers, which form no address that was not mapped, this project does.
        let token = unsafe { UnprotectedDma::new() };
        registry.with_unprotected_dma(token)
    }
}
