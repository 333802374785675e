//! Identify pages: what a controller and a namespace can do.

/// Bytes of a page.
pub const IDENTIFY_BYTES: usize = 4096;

/// A page that makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentifyError {
    /// Too short.
    #[error("Identify page has {0} bytes instead of 4096")]
    Short(usize),
    /// Blocks of another size.
    #[error(
        "Namespace has blocks of 2^{shift} bytes with {metadata} bytes of metadata: format it with 512 or 4096 and none"
    )]
    Format {
        /// Logarithm of the block size.
        shift: u8,
        /// Bytes beside each block.
        metadata: u16,
    },
    /// There is no such namespace.
    #[error("Namespace {0} does not exist or has no blocks: choose another one, or create it")]
    NoNamespace(u32),
    /// Entries of other sizes.
    #[error("Controller does not take commands of 64 bytes and completions of 16 (it says {0:#04x}, {1:#04x})")]
    EntrySizes(u8, u8),
}

/// About the controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControllerInfo {
    /// Serial number, without padding.
    pub serial: String,
    /// Model, without padding.
    pub model: String,
    /// Most bytes of one command; `None`: no limit.
    pub transfer_bytes_max: Option<u64>,
    /// It has Write Zeroes.
    pub write_zeroes: bool,
    /// It has a write cache that a power failure empties.
    pub volatile_cache: bool,
}

impl ControllerInfo {
    /// From the page; a page of memory is 4 KiB.
    ///
    /// # Errors
    /// `Short`, `EntrySizes`.
    pub fn decode(page: &[u8]) -> Result<Self, IdentifyError> {
        if page.len() < IDENTIFY_BYTES {
            return Err(IdentifyError::Short(page.len()));
        }
        let (submission, completion) = (page[512], page[513]);
        let fits = |sizes: u8, shift: u8| sizes & 0xf <= shift && shift <= sizes >> 4;
        if !fits(submission, 6) || !fits(completion, 4) {
            return Err(IdentifyError::EntrySizes(submission, completion));
        }
        let commands = u16::from_le_bytes([page[520], page[521]]);
        Ok(Self {
            serial: text(&page[4..24]),
            model: text(&page[24..64]),
            transfer_bytes_max: (page[77] != 0).then(|| 4096 << page[77].min(32)),
            write_zeroes: commands & 1 << 3 != 0,
            volatile_cache: page[525] & 1 != 0,
        })
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim_matches(|c: char| c.is_whitespace() || c == '\0').to_owned()
}

/// About a namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NamespaceInfo {
    /// Logical blocks.
    pub blocks: u64,
    /// 9 or 12: the logarithm of the block size.
    pub block_shift: u8,
}

impl NamespaceInfo {
    /// From the page of namespace `id`.
    ///
    /// # Errors
    /// `Short`, `NoNamespace`, `Format`.
    pub fn decode(id: u32, page: &[u8]) -> Result<Self, IdentifyError> {
        if page.len() < IDENTIFY_BYTES {
            return Err(IdentifyError::Short(page.len()));
        }
        let blocks = page[..8].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
        if blocks == 0 {
            return Err(IdentifyError::NoNamespace(id));
        }
        // Bits 5 and 6 continue the index where there are more than sixteen formats.
        let format = usize::from(page[26] & 0xf | (page[26] >> 5 & 3) << 4);
        let entry = &page[128 + 4 * format..][..4];
        let (metadata, shift) = (u16::from_le_bytes([entry[0], entry[1]]), entry[2]);
        if metadata != 0 || !matches!(shift, 9 | 12) {
            return Err(IdentifyError::Format { shift, metadata });
        }
        Ok(Self { blocks, block_shift: shift })
    }

    /// Size.
    pub fn len_bytes(&self) -> u64 {
        self.blocks.saturating_mul(1 << self.block_shift)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn controller_page() -> Vec<u8> {
        let mut page = vec![0; IDENTIFY_BYTES];
        page[4..24].copy_from_slice(b"uhmm0               ");
        page[24..64].copy_from_slice(b"QEMU NVMe Ctrl                          ");
        page[77] = 7;
        (page[512], page[513], page[520], page[525]) = (0x66, 0x44, 0x5c, 7);
        page
    }

    #[test]
    fn a_controller_tells_its_limits() {
        let info = ControllerInfo::decode(&controller_page()).unwrap();
        assert_eq!((info.serial.as_str(), info.model.as_str()), ("uhmm0", "QEMU NVMe Ctrl"));
        assert_eq!(info.transfer_bytes_max, Some(512 << 10));
        assert!(info.write_zeroes && info.volatile_cache);
        let mut page = controller_page();
        (page[77], page[520], page[525]) = (0, 0, 0);
        let info = ControllerInfo::decode(&page).unwrap();
        assert!(info.transfer_bytes_max.is_none() && !info.write_zeroes && !info.volatile_cache);
        page[512] = 0x77;
        assert_eq!(ControllerInfo::decode(&page), Err(IdentifyError::EntrySizes(0x77, 0x44)));
        assert_eq!(ControllerInfo::decode(&[0; 100]), Err(IdentifyError::Short(100)));
    }

    #[test]
    fn a_namespace_of_512_or_4096_byte_blocks_is_taken_and_nothing_else() {
        let mut page = vec![0; IDENTIFY_BYTES];
        assert_eq!(NamespaceInfo::decode(7, &page), Err(IdentifyError::NoNamespace(7)));
        page[1] = 0x10;
        (page[26], page[128 + 2], page[132 + 2], page[136]) = (1, 12, 9, 8);
        let info = NamespaceInfo::decode(1, &page).unwrap();
        assert_eq!((info.blocks, info.block_shift, info.len_bytes()), (0x1000, 9, 2 << 20));
        page[26] = 0;
        assert_eq!(NamespaceInfo::decode(1, &page).map(|info| info.block_shift), Ok(12));
        page[26] = 2;
        assert_eq!(NamespaceInfo::decode(1, &page), Err(IdentifyError::Format { shift: 0, metadata: 8 }));
    }
}
