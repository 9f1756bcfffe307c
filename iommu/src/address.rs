//! I/O virtual addresses, access rights and page sizes.

use std::fmt;
use std::ops::BitOr;

/// An address as a device sends it: what the IOMMU translates. Never a pointer of this process, though under
/// SVA the numbers are the same.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Iova(u64);

impl Iova {
    /// The address with this number.
    #[inline]
    pub const fn new(address: u64) -> Self {
        Self(address)
    }

    /// The number, as it is written into a descriptor.
    #[inline]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The address `bytes` further on, or `None` where that is past the end of the 64-bit space.
    #[inline]
    pub const fn checked_add(self, bytes: u64) -> Option<Self> {
        match self.0.checked_add(bytes) {
            Some(address) => Some(Self(address)),
            None => None,
        }
    }

    /// The address `bytes` further on, wrapping as the hardware's adder does.
    #[inline]
    #[must_use]
    pub const fn wrapping_add(self, bytes: u64) -> Self {
        Self(self.0.wrapping_add(bytes))
    }

    /// Whether the address is a multiple of `alignment`, a power of two.
    #[inline]
    pub const fn is_aligned_to(self, alignment: u64) -> bool {
        self.0 & (alignment - 1) == 0
    }
}

impl fmt::Display for Iova {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Debug for Iova {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Iova({:#x})", self.0)
    }
}

/// What a device may do, or tried to do, to memory: read it, write it or both.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Access(u8);

impl Access {
    /// The device reads memory.
    pub const READ: Self = Self(1);
    /// The device writes memory.
    pub const WRITE: Self = Self(2);
    /// Both.
    pub const READ_WRITE: Self = Self(3);

    /// Whether everything in `other` is in `self` too.
    #[inline]
    pub const fn allows(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Bit 0: read, bit 1: write.
    #[inline]
    pub const fn bits(self) -> u8 {
        self.0
    }
}

impl BitOr for Access {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match *self {
            Self::READ => "read",
            Self::WRITE => "write",
            _ => "read-write",
        })
    }
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Access({self})")
    }
}

/// A size of page that memory comes in and an IOMMU maps in one entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PageSize {
    /// 4 KiB, the base page.
    Size4K,
    /// 2 MiB, a huge page.
    Size2M,
    /// 1 GiB, a gigantic page.
    Size1G,
}

impl PageSize {
    /// All sizes, the largest first.
    pub const LARGEST_FIRST: [Self; 3] = [Self::Size1G, Self::Size2M, Self::Size4K];

    /// log2 of the size in bytes.
    #[inline]
    pub const fn shift(self) -> u32 {
        match self {
            Self::Size4K => 12,
            Self::Size2M => 21,
            Self::Size1G => 30,
        }
    }

    /// The size in bytes.
    #[inline]
    pub const fn bytes(self) -> u64 {
        1 << self.shift()
    }
}

impl fmt::Display for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Size4K => "4 KiB",
            Self::Size2M => "2 MiB",
            Self::Size1G => "1 GiB",
        })
    }
}

/// The set of page sizes that an IOMMU can map in one entry: bit n stands for 2^n bytes, as iommufd and VFIO
/// report it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageSizes(pub u64);

impl PageSizes {
    /// 4 KiB, 2 MiB and 1 GiB.
    pub const ALL: Self = Self(1 << 12 | 1 << 21 | 1 << 30);

    /// Whether `size` is one of them.
    pub const fn contains(self, size: PageSize) -> bool {
        self.0 & size.bytes() != 0
    }
}
