//! The device that the frame's own tests drive.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use uhmm_ipc::message::Fd;
use uhmm_kernel_hook::{EventFd, memfd};
use uhmm_pci::PciDevice;

use crate::model::{BarKind, DeviceModel, Host, Identity};

pub const SOURCE: u64 = 0;
pub const TARGET: u64 = 8;
pub const GO: u64 = 16;
pub const FAULTS: u64 = 24;

/// A device that copies 8 bytes from one I/O address to another, a millisecond after it was told to.
pub struct Copier {
    registers: [u64; 4],
    memory: Fd,
}

impl Copier {
    pub fn boxed() -> Box<Self> {
        let memory = memfd::create_sealed("uhmm-copier", 0x10000).unwrap();
        Box::new(Self { registers: [0; 4], memory: Arc::new(memory) })
    }
}

impl DeviceModel for Copier {
    fn identity(&self) -> Identity {
        Identity { vendor: 0x1234, device: 1, class: 0xff_00_00, vectors: 2 }
    }

    fn bars(&self) -> Vec<(u8, BarKind)> {
        let memory = BarKind::Memory { fd: Arc::clone(&self.memory), len_bytes: 0x10000 };
        vec![(0, BarKind::Registers { len_bytes: 4096 }), (2, memory)]
    }

    fn read(&mut self, _bar: u8, offset: u64, bytes: &mut [u8]) {
        let value = self.registers.get(offset as usize / 8).copied().unwrap_or(0) >> (offset % 8 * 8);
        bytes.copy_from_slice(&value.to_le_bytes()[..bytes.len()]);
    }

    fn write(&mut self, _bar: u8, offset: u64, bytes: &[u8], _host: &dyn Host) {
        if let (Some(register), Ok(bytes)) = (self.registers.get_mut(offset as usize / 8), bytes.try_into()) {
            *register = u64::from_le_bytes(bytes);
        }
    }

    fn advance(&mut self, _now: Instant, host: &dyn Host) -> Option<Duration> {
        let go = &mut self.registers[GO as usize / 8];
        match *go {
            0 => return None,
            1 => *go = 2,
            _ => {
                *go = 0;
                let mut bytes = [0; 8];
                let [source, target, ..] = self.registers;
                let done = host.dma_read(source, &mut bytes).and_then(|()| host.dma_write(target, &bytes));
                self.registers[FAULTS as usize / 8] += u64::from(done.is_err());
                host.interrupt(1);
            }
        }
        Some(Duration::from_millis(1))
    }

    fn reset(&mut self) {
        self.registers = [0; 4];
    }
}

pub fn wait(event: &EventFd) {
    let mut fds = [PollFd::from_borrowed_fd(event.as_fd(), PollFlags::IN)];
    let limit = rustix::event::Timespec { tv_sec: 10, tv_nsec: 0 };
    assert_eq!(poll(&mut fds, Some(&limit)), Ok(1), "no interrupt within 10 s");
    assert!(event.drain().unwrap() > 0);
}

pub fn go(device: &PciDevice, done: &EventFd, source: u64, target: u64) {
    let bar = device.bar(0).unwrap();
    bar.store_u64(SOURCE, source).unwrap();
    bar.store_u64(TARGET, target).unwrap();
    bar.store_u64(GO, 1).unwrap();
    wait(done);
}
