//! Memory of this process that uhmm manages: allocated or adopted, by the size of its pages.

use std::time::{Duration, Instant};

use uhmm_kernel_hook::program::{ProgramAdvice, ProgramMemory};
use uhmm_sdk::{Device, PageStatus, Region, Session, StatusRun, Target};

use super::super::host;

/// Whose pages, and how large.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Kind {
    /// Allocated: a memfd.
    Shared,
    /// Adopted private memory.
    Private,
    /// Adopted private memory of huge pages.
    Huge,
}

impl Kind {
    pub const ALL: [Self; 3] = [Self::Shared, Self::Private, Self::Huge];

    pub fn name(self) -> &'static str {
        match self {
            Self::Shared => "shared 4 KiB",
            Self::Private => "private 4 KiB",
            Self::Huge => "private 2 MiB",
        }
    }

    /// Whether this machine has it.
    pub fn here(self) -> Result<(), String> {
        if self == Self::Huge { host::huge_pages() } else { Ok(()) }
    }
}

enum Memory {
    Region(Region),
    Adopted(ProgramMemory),
}

/// See the module head.
pub(in super::super) struct Managed {
    session: Session,
    device: Device,
    memory: Memory,
    kind: Kind,
    len: u64,
}

/// Longest that pages may be busy.
const PATIENCE: Duration = Duration::from_secs(10);
const FILL: usize = 2 << 20;

impl Managed {
    /// `len` bytes, every page written.
    pub fn new(session: Session, device: Device, kind: Kind, len: u64) -> anyhow::Result<Self> {
        let memory = if kind == Kind::Shared {
            Memory::Region(session.allocate(len)?)
        } else {
            let memory = ProgramMemory::private_aligned(len)?;
            let huge = kind == Kind::Huge;
            memory.advise(0, len, if huge { ProgramAdvice::HugePage } else { ProgramAdvice::NoHugePage })?;
            Memory::Adopted(memory)
        };
        let managed = Self { session, device, memory, kind, len };
        managed.write_all()?;
        if let Memory::Adopted(memory) = &managed.memory {
            managed.session.adopt(memory.addr(), len)?;
        }
        Ok(managed)
    }

    fn write_all(&self) -> anyhow::Result<()> {
        let some = vec![1; FILL];
        for off in (0..self.len).step_by(FILL) {
            let part = &some[..(self.len - off).min(FILL as u64) as usize];
            match &self.memory {
                Memory::Region(region) => region.bytes().write(off, part)?,
                Memory::Adopted(memory) => memory.write(off, part)?,
            }
        }
        Ok(())
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    pub fn session(&self) -> &Session {
        &self.session
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The mapping of allocated memory.
    pub fn mapping(&self) -> anyhow::Result<&uhmm_kernel_hook::ManagedMapping> {
        match &self.memory {
            Memory::Region(region) => Ok(region.bytes()),
            Memory::Adopted(_) => anyhow::bail!("Adopted memory has no mapping of uhmm's"),
        }
    }

    pub fn addr(&self) -> u64 {
        match &self.memory {
            Memory::Region(region) => region.addr(),
            Memory::Adopted(memory) => memory.addr(),
        }
    }

    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn load(&self, off: u64) -> anyhow::Result<u64> {
        Ok(match &self.memory {
            Memory::Region(region) => region.bytes().load_u64(off)?,
            Memory::Adopted(memory) => memory.load_u64(off)?,
        })
    }

    pub fn read(&self, off: u64, into: &mut [u8]) -> anyhow::Result<()> {
        match &self.memory {
            Memory::Region(region) => region.bytes().read(off, into)?,
            Memory::Adopted(memory) => memory.read(off, into)?,
        }
        Ok(())
    }

    /// Every page leaves for the device.
    pub fn out(&self) -> anyhow::Result<()> {
        all_go(&self.session, (self.addr(), self.len), self.device.target())
    }

    /// Every page comes home.
    pub fn home(&self) -> anyhow::Result<()> {
        all_go(&self.session, (self.addr(), self.len), Target::Home)
    }
}

/// Migrates every page of a range, whatever was under way there before: pages that are busy are asked for again, which takes its time.
pub(in super::super) fn all_go(session: &Session, (addr, len): (u64, u64), target: Target) -> anyhow::Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        let report = session.migrate(addr, len, target)?;
        if report.complete() {
            return Ok(());
        }
        let stayed = |run: &&StatusRun| !matches!(run.status, PageStatus::Moved | PageStatus::AlreadyThere);
        let first = report.runs.iter().find(stayed);
        if report.runs.iter().filter(stayed).all(|run| run.status == PageStatus::Busy) && Instant::now() < end {
            continue;
        }
        anyhow::bail!("Pages did not go to {target:?}: {first:?} {}", report.why);
    }
}
