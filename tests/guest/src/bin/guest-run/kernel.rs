//! The guest's kernel: Debian's cloud kernel 6.12, downloaded and unpacked, never installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

const META_PACKAGE: &str = "linux-image-6.12-cloud-amd64";

/// An unpacked kernel.
#[derive(Debug)]
pub struct Kernel {
    /// The boot image.
    pub image: PathBuf,
    /// What `uname -r` will say.
    pub release: String,
    /// Files of the modules that the guest needs.
    pub modules: Vec<PathBuf>,
}

const MODULES: [&str; 6] = [
    "virt/lib/irqbypass.ko.xz",
    "drivers/vfio/vfio.ko.xz",
    "drivers/vfio/vfio_iommu_type1.ko.xz",
    "drivers/vfio/pci/vfio-pci-core.ko.xz",
    "drivers/vfio/pci/vfio-pci.ko.xz",
    "drivers/block/brd.ko.xz",
];

/// The kernel of an earlier run, or a new one. An unpacked tree gets its name last, so half of one is never used.
pub fn fetch(out: &Path) -> Result<Kernel> {
    let tree = out.join("kernel");
    if !tree.exists() {
        let fresh = out.join("kernel.new");
        if fresh.exists() {
            fs::remove_dir_all(&fresh)?;
        }
        fs::create_dir_all(&fresh)?;
        download(&fresh)?;
        fs::rename(&fresh, &tree)?;
    }
    find(&tree).with_context(|| format!("{} is not as expected: delete it and run again", tree.display()))
}

/// A new one in any case.
pub fn fetch_again(out: &Path) -> Result<Kernel> {
    fs::remove_dir_all(out.join("kernel"))?;
    fetch(out)
}

fn download(fresh: &Path) -> Result<()> {
    let package = package().or_else(|_| {
        update()?;
        package()
    })?;
    unpack(&package, fresh)
}

/// Downloads a Debian package and unpacks it below `tree`, without installing it.
pub fn unpack(package: &str, tree: &Path) -> Result<()> {
    eprintln!("== downloading {package}");
    let get = || run(Command::new("apt-get").args(["download", "-q", package]).current_dir(tree));
    // Lists that are older than the mirror name packages that are gone.
    get().or_else(|_| update().and_then(|()| get()))?;
    let deb = entries(tree)?.into_iter().find(|path| path.extension().is_some_and(|end| end == "deb"));
    let deb = deb.context("apt-get download left no .deb")?;
    run(Command::new("dpkg").arg("-x").arg(&deb).arg(tree))?;
    Ok(fs::remove_file(&deb)?)
}

/// The package behind the meta-package.
fn package() -> Result<String> {
    let text = run(Command::new("apt-cache").args(["depends", META_PACKAGE]))?;
    let name = text.lines().find_map(|line| line.trim().strip_prefix("Depends: "));
    let name = name.with_context(|| format!("apt-cache knows no {META_PACKAGE}: add Debian 12's security archive"))?;
    Ok(name.to_owned())
}

/// Fetches the lists of packages.
pub fn update() -> Result<()> {
    run(Command::new("apt-get").args(["update", "-q"]))
        .context("Run `apt-get update` as root, then this again")
        .map(drop)
}

/// Its output; an error with what it said.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("Start {command:?}: this needs a Debian machine"))?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?} ended with {}: {}", output.status, error.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    let list = fs::read_dir(dir).with_context(|| format!("Read {}", dir.display()))?;
    list.map(|entry| Ok(entry?.path())).collect()
}

fn find(tree: &Path) -> Result<Kernel> {
    let image = entries(&tree.join("boot"))?
        .into_iter()
        .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz")))
        .context("There is no boot/vmlinuz*")?;
    let installed = entries(&tree.join("lib/modules"))?.pop().context("There are no modules")?;
    let modules: Vec<PathBuf> = MODULES.iter().map(|name| installed.join("kernel").join(name)).collect();
    for module in &modules {
        ensure!(module.exists(), "There is no {}", module.display());
    }
    let release = installed.file_name().context("A release has a name")?.to_string_lossy().into_owned();
    Ok(Kernel { image, release, modules })
}
