//! Where a service runs: its program, its sockets, its device.

use std::io::Read;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use uhmm_kernel_hook::confine::{FileAccess, Folders};
use uhmm_manifest::{NbdPlace, Plan, ServicePlan};
use uhmm_pci::PciPath;

use crate::Role;

/// Sockets of whatever else runs on a machine lie there.
const COVERED: &[&str] = &["/run"];
/// What any program reads: its libraries, itself, how many processors it may use.
const READ: &[&str] = &[
    "/etc/ld.so.cache",
    "/etc/ld.so.preload",
    "/lib",
    "/lib64",
    "/proc/self",
    "/sys/devices/system/cpu",
    "/sys/fs/cgroup",
    "/usr/lib",
    "/usr/lib64",
    "/usr/local/lib",
];
const WRITE: &[&str] = &["/dev/null"];
/// How a VFIO device is found.
const SYSFS: &[&str] = &["/sys/bus/pci", "/sys/devices", "/sys/class/vfio-dev", "/sys/kernel/iommu_groups"];
const PROGRAM_HEADER_INTERPRETER: u32 = 3;

/// See the module head.
#[derive(Clone, Debug)]
pub struct Place {
    /// Where the sockets are.
    pub run_dir: PathBuf,
    /// The `uhmm` program.
    pub exe: PathBuf,
}

impl Place {
    /// What a service sees in the place of the run directory: the sockets that it may connect to, and nothing else.
    #[must_use]
    pub fn view(&self, service: &str) -> PathBuf {
        self.run_dir.join("view").join(service)
    }

    /// The sockets of a service's device that lie among the services' own, where their folder is not shown.
    #[must_use]
    pub fn device_sockets(&self, plan: &Plan, service: &str) -> Vec<PathBuf> {
        device_sockets(plan, service).filter(|socket| socket.parent() == Some(&self.run_dir)).collect()
    }

    /// Programs of uhmm.
    pub(crate) fn files_of_built_in(&self) -> Vec<(PathBuf, FileAccess)> {
        self.files_of_program(&self.exe)
    }

    fn files_of_program(&self, program: &Path) -> Vec<(PathBuf, FileAccess)> {
        let with = |access| move |path: &&str| (PathBuf::from(*path), access);
        let mut files: Vec<_> = READ.iter().map(with(FileAccess::Read)).collect();
        files.extend(WRITE.iter().map(with(FileAccess::Write)));
        files.push((program.to_owned(), FileAccess::Execute));
        files.extend(interpreter(program).map(|path| (path, FileAccess::Execute)));
        files.push((self.run_dir.clone(), FileAccess::Read));
        files
    }

    /// Files of a service, by its kind, its device and its manifest.
    pub(crate) fn files_of(&self, plan: &Plan, service: &ServicePlan, role: Role) -> Vec<(PathBuf, FileAccess)> {
        let mut files = self.files_of_program(&self.program(service));
        if role == Role::Pager {
            // Control groups of clients. Landlock itself keeps their memory closed.
            files.push(("/proc".into(), FileAccess::Read));
            // For clients that may not open it themselves.
            files.push(("/dev/userfaultfd".into(), FileAccess::Device));
        }
        if let Some(PciPath::Vfio(address)) = plan.driver_service(&service.name).and_then(|device| device.pci.as_ref())
        {
            files.extend(SYSFS.iter().map(|path| (PathBuf::from(path), FileAccess::Read)));
            files.extend(vfio_nodes(Path::new("/sys"), &address.to_string()).map(|path| (path, FileAccess::Device)));
        }
        if let Some(path) = plan.driver_service(&service.name).and_then(|device| device.path.as_ref()) {
            // One that is not there is made, which is a right to its folder.
            files.push(match path.parent() {
                Some(folder) if !path.exists() => (folder.to_owned(), FileAccess::Create),
                _ => (path.clone(), FileAccess::Device),
            });
        }
        let sandbox = &service.sandbox;
        let given = [
            (&sandbox.read, FileAccess::Read),
            (&sandbox.write, FileAccess::Device),
            (&sandbox.execute, FileAccess::Execute),
        ];
        files
            .extend(given.into_iter().flat_map(|(paths, access)| paths.iter().map(move |path| (path.clone(), access))));
        files
    }

    /// What a service sees of what others do not want to show.
    pub(crate) fn folders_of(&self, plan: &Plan, service: &ServicePlan) -> Folders {
        let sandbox = &service.sandbox;
        let mut shown = vec![self.program(service)];
        shown.extend([&sandbox.read, &sandbox.write, &sandbox.execute].into_iter().flatten().cloned());
        // Their folders: a device or a server that is started again makes another socket there.
        let folders = device_sockets(plan, &service.name).filter_map(|socket| Some(socket.parent()?.to_owned()));
        shown.extend(folders.filter(|folder| *folder != self.run_dir));
        let file = plan.driver_service(&service.name).and_then(|device| device.path.as_ref());
        shown.extend(file.map(|path| path.parent().filter(|_| !path.exists()).unwrap_or(path).to_owned()));
        Folders {
            covered: COVERED.iter().map(PathBuf::from).collect(),
            shown,
            view: Some((self.view(&service.name), self.run_dir.clone())),
        }
    }

    fn program(&self, service: &ServicePlan) -> PathBuf {
        match service.command.first() {
            Some(program) if service.external => PathBuf::from(program),
            _ => self.exe.clone(),
        }
    }
}

/// Where a device in another process listens, or a block server.
fn device_sockets<'a>(plan: &'a Plan, service: &str) -> impl Iterator<Item = PathBuf> + use<'a> {
    let device = plan.driver_service(service);
    let pci = device.and_then(|device| match &device.pci {
        Some(PciPath::VfioUser(socket)) => Some(socket.clone()),
        _ => None,
    });
    let urls = device.and_then(|device| device.remote.as_ref()).into_iter().flat_map(|remote| &remote.urls);
    pci.into_iter().chain(urls.filter_map(|url| match &url.place {
        NbdPlace::Unix(socket) => Some(socket.clone()),
        NbdPlace::Tcp(_) => None,
    }))
}

/// Where a service's block servers listen by TCP.
pub(crate) fn server_addresses(plan: &Plan, service: &str) -> Vec<SocketAddr> {
    let remote = plan.driver_service(service).and_then(|device| device.remote.as_ref());
    let places = remote.into_iter().flat_map(|remote| &remote.urls).map(|url| &url.place);
    places
        .filter_map(|place| match place {
            NbdPlace::Tcp(address) => Some(*address),
            NbdPlace::Unix(_) => None,
        })
        .collect()
}

/// The device files of a PCI device's VFIO group, and of the device itself where the kernel has such.
fn vfio_nodes(sysfs: &Path, address: &str) -> impl Iterator<Item = PathBuf> {
    let device = sysfs.join("bus/pci/devices").join(address);
    let group = std::fs::read_link(device.join("iommu_group")).ok();
    let group = group.and_then(|link| Some(link.file_name()?.to_string_lossy().into_owned()));
    let entries = std::fs::read_dir(device.join("vfio-dev")).into_iter().flatten().flatten();
    let own = entries.map(|entry| Path::new("/dev/vfio/devices").join(entry.file_name()));
    let of_group = group.map(|group| Path::new("/dev/vfio").join(group));
    let ways = ["/dev/vfio/vfio", "/dev/iommu"].map(PathBuf::from);
    ways.into_iter().chain(of_group).chain(own.collect::<Vec<_>>())
}

/// The program that the kernel starts first for another one: its dynamic linker, or the first line of a script.
fn interpreter(program: &Path) -> Option<PathBuf> {
    let mut head = Vec::new();
    std::fs::File::open(program).ok()?.take(1 << 16).read_to_end(&mut head).ok()?;
    if let Some(line) = head.strip_prefix(b"#!") {
        let line = String::from_utf8_lossy(line.split(|byte| *byte == b'\n').next()?).into_owned();
        return line.split_whitespace().next().map(PathBuf::from);
    }
    let word = |at: usize, len: usize| {
        let bytes = head.get(at..at.checked_add(len)?)?;
        Some(bytes.iter().rev().fold(0u64, |all, byte| all << 8 | u64::from(*byte)))
    };
    if head.get(..5)? != b"\x7fELF\x02" {
        return None;
    }
    let (table, size, count) = (word(32, 8)? as usize, word(54, 2)? as usize, word(56, 2)? as usize);
    let headers = (0..count).filter_map(|index| table.checked_add(index.checked_mul(size)?));
    let at = headers.into_iter().find(|at| word(*at, 4) == Some(u64::from(PROGRAM_HEADER_INTERPRETER)))?;
    let (offset, len) = (word(at + 8, 8)? as usize, word(at + 32, 8)? as usize);
    let name = head.get(offset..offset.checked_add(len)?)?;
    Some(PathBuf::from(String::from_utf8_lossy(name.split(|byte| *byte == 0).next()?).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interpreter_of_a_program_and_of_a_script_is_found() {
        let own = std::env::current_exe().expect("this test has a path");
        let found = interpreter(&own).expect("a test is linked dynamically");
        assert!(found.exists() && found.to_string_lossy().contains("ld"), "{found:?}");
        let dir = tempfile::tempdir().expect("a folder");
        let script = dir.path().join("script");
        std::fs::write(&script, "#!/bin/sh -e\ntrue\n").expect("a script");
        assert_eq!(interpreter(&script), Some("/bin/sh".into()));
        for (name, text) in
            [("empty", &b""[..]), ("text", b"hello"), ("cut", b"\x7fELF\x02\x01"), ("wild", &[0xff; 64])]
        {
            let path = dir.path().join(name);
            std::fs::write(&path, text).expect("a file");
            assert_eq!(interpreter(&path), None, "{name}");
        }
        let mut wild = b"\x7fELF\x02".to_vec();
        wild.resize(64, 0xff);
        let path = dir.path().join("wild-elf");
        std::fs::write(&path, wild).expect("a file");
        assert_eq!(interpreter(&path), None, "offsets beyond everything");
    }

    #[test]
    fn only_the_own_group_of_a_pci_device_is_shown() {
        let dir = tempfile::tempdir().expect("a folder");
        let device = dir.path().join("bus/pci/devices/0000:00:05.0");
        std::fs::create_dir_all(device.join("vfio-dev/vfio3")).expect("folders");
        std::os::unix::fs::symlink("../../../kernel/iommu_groups/7", device.join("iommu_group")).expect("a link");
        let nodes: Vec<PathBuf> = vfio_nodes(dir.path(), "0000:00:05.0").collect();
        let expected = ["/dev/vfio/vfio", "/dev/iommu", "/dev/vfio/7", "/dev/vfio/devices/vfio3"];
        assert_eq!(nodes, expected.map(PathBuf::from));
        assert_eq!(vfio_nodes(dir.path(), "0000:00:06.0").count(), 2, "one that is not there has no group");
    }
}
