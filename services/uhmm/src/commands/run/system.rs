//! Where a program's memory goes: to a device of a running system, or of one that is started for the program alone.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use uhmm_manifest::ByteSize;
use uhmm_sdk::Error;
use uhmm_watch::events::bytes;
use uhmm_watch::sample::{Sample, Sampler};

use super::RunArgs;
use crate::commands::remove;
use crate::demo::{System, make_private};

/// Far memory where nobody says how much: so many times the limit, or so much without one, but never more than half of what is free on that disk.
const FAR_TIMES: u64 = 4;
const FAR_USUAL_BYTES: u64 = 1 << 30;

/// A device, and the system that it belongs to.
pub struct Place {
    pub run_dir: PathBuf,
    pub device: u8,
    /// Runs for the program alone.
    pub own: Option<Own>,
}

/// A system of its own. Fields are dropped in this order: the files go last.
pub struct Own {
    _system: System,
    _folders: Vec<Folder>,
}

/// Is removed at the end.
struct Folder(PathBuf);

impl Folder {
    fn new(path: PathBuf) -> anyhow::Result<Self> {
        make_private(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.0) {
            eprintln!("uhmm run: {error:#}");
        }
    }
}

/// What the arguments say; without any, the running system, and where none runs, one with a file.
pub fn place(args: &RunArgs, run_dir: Option<&Path>) -> anyhow::Result<Place> {
    let run_dir = uhmm_sdk::run_dir(run_dir);
    if args.far.is_some() || args.soft.is_some() {
        return own(args);
    }
    match Sampler::connect(Some(&run_dir)).and_then(|mut sampler| sampler.sample()) {
        Ok(sample) => Ok(Place { run_dir, device: choose(&sample, args.device.as_deref())?, own: None }),
        Err(Error::NotRunning { .. }) if args.device.is_none() => own(args),
        Err(error) => Err(error.into()),
    }
}

fn choose(sample: &Sample, name: Option<&str>) -> anyhow::Result<u8> {
    let devices = sample.devices.iter().enumerate();
    let chosen = match name {
        Some(name) => devices.clone().find(|(_, device)| device.name == name),
        None => devices.clone().max_by_key(|(id, device)| (device.free_bytes, std::cmp::Reverse(*id))),
    };
    let known = || sample.devices.iter().map(|device| device.name.as_str()).collect::<Vec<_>>().join(", ");
    match (chosen, name) {
        (Some((id, device)), _) if device.memory_bytes > 0 => Ok(u8::try_from(id)?),
        (Some((_, device)), _) => bail!("Device {} is not ready: see `uhmm status`", device.name),
        (None, Some(name)) => bail!("The running system has no device {name:?}: take one of {}", known()),
        (None, None) => bail!("The running system has no device: start one that has, or say --far SIZE"),
    }
}

fn own(args: &RunArgs) -> anyhow::Result<Place> {
    let name = format!("uhmm-run-{}", std::process::id());
    let folder = Folder::new(std::env::temp_dir().join(&name))?;
    let (run_dir, manifest) = (folder.0.join("run"), folder.0.join("manifest.toml"));
    make_private(&run_dir)?;
    let mut folders = vec![folder];
    let (up, failed): (Vec<OsString>, String) = if let Some(size) = args.soft {
        std::fs::write(&manifest, software(size))?;
        (vec!["--manifest".into(), manifest.into()], "No system could be started".into())
    } else {
        let path = match args.far.as_ref().and_then(|far| far.path()) {
            Some(path) => std::path::absolute(path)?,
            None => {
                folders.push(Folder::new(Path::new("/var/tmp").join(&name))?);
                Path::new("/var/tmp").join(&name).join("far0")
            }
        };
        let size = match args.far.as_ref() {
            Some(far) => far.size().0,
            None => usual_bytes(args.ram, &path)?,
        };
        check_disk(&path, size)?;
        let failed = format!(
            "No far memory of {} in {}: say how much and where, with --far SIZE:PATH",
            bytes(size),
            path.display()
        );
        (vec!["--file".into(), format!("{size}B:{}", path.display()).into()], failed)
    };
    let up: Vec<&OsStr> = up.iter().map(OsString::as_os_str).chain([OsStr::new("--log"), OsStr::new("text")]).collect();
    let removed: Vec<&Path> = folders.iter().map(|folder| folder.0.as_path()).collect();
    let system = System::start_in(run_dir.clone(), &up, &removed).context(failed)?;
    Ok(Place { run_dir, device: 0, own: Some(Own { _system: system, _folders: folders }) })
}

/// What the driver would refuse as well, but some time later.
fn check_disk(path: &Path, size_bytes: u64) -> anyhow::Result<()> {
    let folder = path.parent().filter(|folder| folder.is_dir());
    let folder = folder.with_context(|| {
        format!("The folder of {} is not there: make it, or say another one with --far SIZE:PATH", path.display())
    })?;
    let free = free_bytes(folder)? + std::fs::metadata(path).map_or(0, |file| file.len());
    if free < size_bytes {
        bail!(
            "{} has room for {}, and --far wants {}: say less, or another place",
            folder.display(),
            bytes(free),
            bytes(size_bytes)
        );
    }
    Ok(())
}

/// On the disk of a folder, for this account.
fn free_bytes(folder: &Path) -> anyhow::Result<u64> {
    let disk = rustix::fs::statvfs(folder).with_context(|| format!("{} cannot be looked at", folder.display()))?;
    Ok(disk.f_bavail * disk.f_frsize)
}

/// Of a file that nobody has said the size of.
fn usual_bytes(ram: Option<ByteSize>, path: &Path) -> anyhow::Result<u64> {
    let folder = path.parent().context("A path has a folder")?;
    let half = free_bytes(folder)? / 2;
    let wanted = ram.map_or(FAR_USUAL_BYTES, |ram| ram.0.saturating_mul(FAR_TIMES));
    Ok(wanted.min(half) / (1 << 20) * (1 << 20))
}

fn software(size: ByteSize) -> String {
    format!(
        r#"
[[service]]
name = "pager"
kind = "pager"

[[service]]
name = "mirror"
kind = "mirror"

[[service]]
name = "soft0"
kind = "driver"
driver = "soft"

[[device]]
name = "soft0"
service = "soft0"
memory_bytes = "{}B"
"#,
        size.0
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use uhmm_watch::sample::Device;

    fn device(name: &str, memory_bytes: u64, free_bytes: u64) -> Device {
        Device { name: name.into(), memory_bytes, free_bytes }
    }

    #[test]
    fn the_device_with_the_most_room_is_taken_or_the_named_one() {
        let devices = vec![device("a", 10, 3), device("b", 10, 7), device("c", 0, 0)];
        let sample = Sample { devices, ..Sample::default() };
        assert_eq!((choose(&sample, None).unwrap(), choose(&sample, Some("a")).unwrap()), (1, 0));
        let text = choose(&sample, Some("x")).unwrap_err().to_string();
        assert!(text.contains("a, b, c"), "{text}");
        assert!(choose(&sample, Some("c")).unwrap_err().to_string().contains("not ready"));
        assert!(choose(&Sample::default(), None).unwrap_err().to_string().contains("--far"));
    }

    #[test]
    fn the_usual_file_takes_no_more_than_half_of_a_disk() {
        let path = std::env::temp_dir().join("far0");
        let ram = |bytes| Some(ByteSize(bytes));
        assert_eq!(usual_bytes(ram(16 << 20), &path).unwrap(), 64 << 20);
        let all = usual_bytes(ram(u64::MAX / 2), &path).unwrap();
        assert!(all < 1 << 60 && all.is_multiple_of(1 << 20));
    }

    #[test]
    fn the_software_system_is_a_manifest() {
        let plan = uhmm_manifest::Manifest::parse(&software(ByteSize(64 << 20))).unwrap().resolve().unwrap();
        assert_eq!(plan.device_by_name("soft0").unwrap().memory_bytes, 64 << 20);
    }
}
