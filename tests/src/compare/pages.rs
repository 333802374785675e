//! Swap devices that are ours for the time of one run: they go away with their value.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Before any other swap device.
const PRIORITY: &str = "32767";
const ZRAM_CONTROL: &str = "/sys/class/zram-control";

/// A swap device that is in use.
#[derive(Debug)]
pub struct Swap {
    device: PathBuf,
    zram: Option<String>,
}

impl Swap {
    /// Compressed memory, of the kernel's usual compressor.
    pub fn zram(bytes: u64) -> Result<Self, String> {
        let id = fs::read_to_string(Path::new(ZRAM_CONTROL).join("hot_add"))
            .map_err(|error| format!("{ZRAM_CONTROL}/hot_add: {error}: run as root, after `modprobe zram`"))?;
        let id = id.trim().to_owned();
        let swap = Self { device: Path::new("/dev").join(format!("zram{id}")), zram: Some(id.clone()) };
        let size = Path::new("/sys/block").join(format!("zram{id}")).join("disksize");
        fs::write(&size, bytes.to_string()).map_err(|error| format!("{}: {error}", size.display()))?;
        swap.begin()
    }

    /// A file, without holes.
    pub fn file(path: PathBuf, bytes: u64) -> Result<Self, String> {
        let swap = Self { device: path, zram: None };
        let made = fs::OpenOptions::new().write(true).create_new(true).open(&swap.device);
        let file = made.map_err(|error| format!("{}: {error}", swap.device.display()))?;
        rustix::fs::fchmod(&file, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR)
            .and_then(|()| rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes))
            .map_err(|error| format!("{}: {error}", swap.device.display()))?;
        swap.begin()
    }

    fn begin(self) -> Result<Self, String> {
        run(Command::new("mkswap").arg(&self.device))?;
        run(Command::new("swapon").args(["-p", PRIORITY]).arg(&self.device))?;
        Ok(self)
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        // It may never have been in use.
        let _ = run(Command::new("swapoff").arg(&self.device));
        let removed = match &self.zram {
            Some(id) => fs::write(Path::new(ZRAM_CONTROL).join("hot_remove"), id),
            None => fs::remove_file(&self.device),
        };
        if let Err(error) = removed {
            eprintln!("{} stays: {error}", self.device.display());
        }
    }
}

/// What is left of a harness that was killed: swap files below a folder, and nothing else.
pub fn swapoff_below(folder: &Path) {
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    for device in swaps.lines().skip(1).filter_map(|line| line.split_whitespace().next()) {
        if Path::new(device).starts_with(folder) {
            let _ = run(Command::new("swapoff").arg(device));
        }
    }
}

fn run(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    let text = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(()) } else { Err(format!("{command:?} failed: {}", text.trim())) }
}
