//! What travels through the copy ring between the pager and a driver without an aperture.
//!
//! ```text
//!            submit ring: CopyRequest, 64 bytes            completion ring: CopyCompletion, 64 bytes
//!   pager  ------------------------------------>  driver  ------------------------------------->  pager
//!            bulk bytes: staging memfd, addressed by page number, never by pointer
//! ```
//! Both ends are little endian on the same machine; every field is checked by the end that reads it, since the other end can
//! write whatever it likes at any time. A slot is decoded from a private copy.
//!
//! ```text
//!   request      op u32 @0 | count u32 @4 | ticket u64 @8 | frame u32 @16 | staging_page u32 @20 | zero to 64
//!   completion   ticket u64 @0 | status u32 @8 | good u32 @12 | lost u32 @16 | zero to 64
//! ```

/// Bytes of a descriptor in either direction.
pub const DESCRIPTOR_BYTES: usize = 64;

/// A slot that does not decode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CopyRingError {
    /// Operation number out of the closed set.
    #[error("Copy request has the unknown operation {op}: both ends must be of the same version")]
    UnknownOp {
        /// What was read.
        op: u32,
    },
    /// Status number out of the closed set.
    #[error("Copy completion has the unknown status {status}: both ends must be of the same version")]
    UnknownStatus {
        /// What was read.
        status: u32,
    },
}

/// What the copy engine shall do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CopyOp {
    /// Staging pages to device frames.
    CopyIn,
    /// Device frames to staging pages.
    CopyOut,
    /// Device frames become zero; `staging_page` is ignored.
    Scrub,
}

impl CopyOp {
    fn to_wire(self) -> u32 {
        match self {
            CopyOp::CopyIn => 1,
            CopyOp::CopyOut => 2,
            CopyOp::Scrub => 3,
        }
    }

    fn from_wire(op: u32) -> Result<Self, CopyRingError> {
        match op {
            1 => Ok(CopyOp::CopyIn),
            2 => Ok(CopyOp::CopyOut),
            3 => Ok(CopyOp::Scrub),
            op => Err(CopyRingError::UnknownOp { op }),
        }
    }
}

/// One request of the pager. `count` consecutive frames and `count` consecutive staging pages, 4 KiB each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyRequest {
    /// What to do.
    pub op: CopyOp,
    /// Chosen by the pager, echoed by the completion.
    pub ticket: u64,
    /// First device frame.
    pub frame: u32,
    /// Frames.
    pub count: u32,
    /// First page of the staging area.
    pub staging_page: u32,
}

impl CopyRequest {
    /// The slot's bytes.
    pub fn encode(&self) -> [u8; DESCRIPTOR_BYTES] {
        let mut slot = [0; DESCRIPTOR_BYTES];
        slot[0..4].copy_from_slice(&self.op.to_wire().to_le_bytes());
        slot[4..8].copy_from_slice(&self.count.to_le_bytes());
        slot[8..16].copy_from_slice(&self.ticket.to_le_bytes());
        slot[16..20].copy_from_slice(&self.frame.to_le_bytes());
        slot[20..24].copy_from_slice(&self.staging_page.to_le_bytes());
        slot
    }

    /// Reads a slot. Ranges are not checked here: only the driver knows how many frames and staging pages there are.
    pub fn decode(slot: &[u8; DESCRIPTOR_BYTES]) -> Result<Self, CopyRingError> {
        Ok(Self {
            op: CopyOp::from_wire(u32_at(slot, 0))?,
            count: u32_at(slot, 4),
            ticket: u64_at(slot, 8),
            frame: u32_at(slot, 16),
            staging_page: u32_at(slot, 20),
        })
    }

    /// The frames lie inside a device of `frame_count` frames, the staging pages inside `staging_pages` (not asked for
    /// [`CopyOp::Scrub`]), and at least one frame is named.
    pub fn in_bounds(&self, frame_count: u32, staging_pages: u32) -> bool {
        let ends_by = |first: u32, limit: u32| first.checked_add(self.count).is_some_and(|end| end <= limit);
        self.count > 0
            && ends_by(self.frame, frame_count)
            && (self.op == CopyOp::Scrub || ends_by(self.staging_page, staging_pages))
    }
}

/// How a copy ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CopyStatus {
    /// All frames done.
    Ok,
    /// The request named frames or staging pages that do not exist; nothing was touched.
    OutOfRange,
    /// The device failed; the destination holds undefined bytes.
    Io,
    /// Of [`CopyOp::CopyOut`]: the first `good` frames were copied, and the `lost` ones behind them cannot be had any more. The rest was not
    /// copied, or was; it is asked for again.
    Lost {
        /// Frames that were copied.
        good: u32,
        /// Frames that are lost; one at least.
        lost: u32,
    },
}

/// One answer of the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyCompletion {
    /// From the request.
    pub ticket: u64,
    /// How it ended.
    pub status: CopyStatus,
}

impl CopyCompletion {
    /// The slot's bytes.
    pub fn encode(&self) -> [u8; DESCRIPTOR_BYTES] {
        let mut slot = [0; DESCRIPTOR_BYTES];
        let status: u32 = match self.status {
            CopyStatus::Ok => 0,
            CopyStatus::OutOfRange => 1,
            CopyStatus::Io => 2,
            CopyStatus::Lost { good, lost } => {
                slot[12..16].copy_from_slice(&good.to_le_bytes());
                slot[16..20].copy_from_slice(&lost.to_le_bytes());
                3
            }
        };
        slot[0..8].copy_from_slice(&self.ticket.to_le_bytes());
        slot[8..12].copy_from_slice(&status.to_le_bytes());
        slot
    }

    /// Reads a slot.
    pub fn decode(slot: &[u8; DESCRIPTOR_BYTES]) -> Result<Self, CopyRingError> {
        let status = match u32_at(slot, 8) {
            0 => CopyStatus::Ok,
            1 => CopyStatus::OutOfRange,
            2 => CopyStatus::Io,
            3 => CopyStatus::Lost { good: u32_at(slot, 12), lost: u32_at(slot, 16) },
            status => return Err(CopyRingError::UnknownStatus { status }),
        };
        Ok(Self { ticket: u64_at(slot, 0), status })
    }
}

fn u32_at(slot: &[u8; DESCRIPTOR_BYTES], offset: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| slot[offset + i]))
}

fn u64_at(slot: &[u8; DESCRIPTOR_BYTES], offset: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| slot[offset + i]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_survives_the_ring() {
        for op in [CopyOp::CopyIn, CopyOp::CopyOut, CopyOp::Scrub] {
            let request = CopyRequest { op, ticket: u64::MAX - 5, frame: 0x1234_5678, count: 512, staging_page: 77 };
            assert_eq!(CopyRequest::decode(&request.encode()), Ok(request));
        }
    }

    #[test]
    fn a_completion_survives_the_ring() {
        for status in
            [CopyStatus::Ok, CopyStatus::OutOfRange, CopyStatus::Io, CopyStatus::Lost { good: 7, lost: 1 << 20 }]
        {
            let completion = CopyCompletion { ticket: 0x0102_0304_0506_0708, status };
            assert_eq!(CopyCompletion::decode(&completion.encode()), Ok(completion));
        }
    }

    #[test]
    fn unknown_numbers_are_refused_by_name() {
        let mut slot = CopyRequest { op: CopyOp::CopyIn, ticket: 1, frame: 0, count: 1, staging_page: 0 }.encode();
        slot[0] = 9;
        assert_eq!(CopyRequest::decode(&slot), Err(CopyRingError::UnknownOp { op: 9 }));
        let mut slot = CopyCompletion { ticket: 1, status: CopyStatus::Ok }.encode();
        slot[8] = 4;
        assert_eq!(CopyCompletion::decode(&slot), Err(CopyRingError::UnknownStatus { status: 4 }));
    }

    #[test]
    fn bounds_hold_at_both_ends_and_against_overflow() {
        let request = |op, frame, count, staging_page| CopyRequest { op, ticket: 0, frame, count, staging_page };
        assert!(request(CopyOp::CopyIn, 6, 2, 2).in_bounds(8, 4));
        assert!(!request(CopyOp::CopyIn, 7, 2, 2).in_bounds(8, 4));
        assert!(!request(CopyOp::CopyOut, 0, 2, 3).in_bounds(8, 4));
        assert!(request(CopyOp::Scrub, 0, 2, 3).in_bounds(8, 4));
        assert!(!request(CopyOp::Scrub, u32::MAX, 2, 0).in_bounds(u32::MAX, 4));
        assert!(!request(CopyOp::CopyIn, 0, 0, 0).in_bounds(8, 4));
    }
}
