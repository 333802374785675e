//! Modules with iommufd and VFIO's device files, which Debian's kernels leave out: built for exactly the guest's kernel, outside of its tree.
//!
//! ```text
//!   linux-headers-RELEASE, -common, linux-kbuild  (same version)  --+-- make M=  --> TARGET/guest/modules-RELEASE/*.ko
//!   linux-source-6.12: drivers/vfio, drivers/iommu/iommufd ---------+
//! ```
//! Everything is unpacked, nothing installed, and what the build leaves is removed. The headers bring Debian's configuration and the checksums of
//! the kernel's symbols, so the kernel need not be configured again (and no flex, bison or bc is needed); what is switched on beside it goes
//! to make and to the compiler as words of the command line.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::kernel::{Kernel, run, unpack, update};

const SOURCE_PACKAGE: &str = "linux-source-6.12";
/// The only parts of the source that are unpacked.
const SOURCES: [&str; 4] =
    ["drivers/vfio", "drivers/iommu/iommufd", "drivers/iommu/iommu-priv.h", "lib/interval_tree.c"];
/// What is on beside Debian's configuration: for make, and for the compiler.
const SWITCHES: [(&str, &str); 3] = [
    ("CONFIG_IOMMUFD=m", "CONFIG_IOMMUFD_MODULE"),
    ("CONFIG_VFIO_DEVICE_CDEV=y", "CONFIG_VFIO_DEVICE_CDEV"),
    ("CONFIG_INTERVAL_TREE_SPAN_ITER=y", "CONFIG_INTERVAL_TREE_SPAN_ITER"),
];
/// What is built, in the build tree.
const BUILT: [&str; 5] = [
    "drivers/iommu/iommufd/iommufd.ko",
    "drivers/vfio/vfio.ko",
    "drivers/vfio/vfio_iommu_type1.ko",
    "drivers/vfio/pci/vfio-pci-core.ko",
    "drivers/vfio/pci/vfio-pci.ko",
];

/// The modules for this kernel were built by an earlier run, or the archive still has what they are built from.
pub fn can_have_modules(out: &Path, kernel: &Kernel) -> bool {
    ready(out, kernel).exists() || describe(kernel).is_ok()
}

/// All modules for the guest: those of an earlier run for this kernel, or new ones; and Debian's where they are not replaced.
pub fn modules(out: &Path, kernel: &Kernel) -> Result<Vec<PathBuf>> {
    let ready = ready(out, kernel);
    if !ready.exists() {
        let started = Instant::now();
        let work = out.join("modules.new");
        if work.exists() {
            fs::remove_dir_all(&work)?;
        }
        fs::create_dir_all(&work)?;
        let built = prepare(&work, kernel).and_then(|headers| build(&work, &headers))?;
        // The directory gets its name last, so half of it is never used.
        fs::rename(built, &ready)?;
        fs::remove_dir_all(&work)?;
        eprintln!("== modules with iommufd: {:.0} s", started.elapsed().as_secs_f64());
    }
    let mut all: Vec<PathBuf> = BUILT.iter().map(|module| ready.join(name_of(module))).collect();
    all.extend(kernel.modules.iter().filter(|module| !is_replaced(module)).cloned());
    Ok(all)
}

fn ready(out: &Path, kernel: &Kernel) -> PathBuf {
    out.join(format!("modules-{}", kernel.release))
}

/// What apt knows about the headers of this kernel.
fn describe(kernel: &Kernel) -> Result<String> {
    let show = || run(Command::new("apt-cache").args(["show", "--no-all-versions", &headers_of(kernel)]));
    show().or_else(|_| update().and_then(|()| show()))
}

fn headers_of(kernel: &Kernel) -> String {
    format!("linux-headers-{}", kernel.release)
}

fn name_of(module: &str) -> &str {
    module.rsplit('/').next().unwrap_or(module)
}

fn is_replaced(debians: &Path) -> bool {
    let name = debians.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    BUILT.iter().any(|module| name.trim_end_matches(".xz") == name_of(module))
}

/// Headers and source; answers where the headers' makefile is.
fn prepare(work: &Path, kernel: &Kernel) -> Result<PathBuf> {
    let headers = headers_of(kernel);
    let text = describe(kernel).context("The archive has no headers of the guest's kernel")?;
    let (version, needed) = needs(&text)?;
    for package in needed.iter().map(String::as_str).chain([headers.as_str(), SOURCE_PACKAGE]) {
        unpack(&format!("{package}={version}"), work)?;
    }
    eprintln!("== unpacking the source");
    let source = work.join("usr/src").join(format!("{SOURCE_PACKAGE}.tar.xz"));
    let wanted = SOURCES.map(|path| format!("{SOURCE_PACKAGE}/{path}"));
    run(Command::new("tar").arg("-xJf").arg(source).arg("-C").arg(work).args(wanted))?;
    relocate(work, &headers)
}

/// Version of the headers, and the packages of the same version that they need.
fn needs(description: &str) -> Result<(String, Vec<String>)> {
    let field = |name: &str| description.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let version = field("Version:").context("apt-cache shows no version")?;
    let depends = field("Depends:").context("apt-cache shows no dependencies")?;
    let packages = depends.split(',').filter_map(|item| item.split_whitespace().next());
    let needed: Vec<String> = packages
        .filter(|name| name.ends_with("-common") || name.starts_with("linux-kbuild-"))
        .map(str::to_owned)
        .collect();
    ensure!(needed.len() == 2, "The headers need other packages than a -common and a linux-kbuild one: {depends}");
    Ok((version.to_owned(), needed))
}

/// The headers' makefile names the common one by its place in an installed system.
fn relocate(work: &Path, headers: &str) -> Result<PathBuf> {
    let dir = work.join("usr/src").join(headers);
    let makefile = dir.join("Makefile");
    let text = fs::read_to_string(&makefile).with_context(|| format!("Read {}", makefile.display()))?;
    let here = format!("include {}/usr/src/", work.display());
    let moved = text.replace("include /usr/src/", &here);
    ensure!(moved != text, "{} includes nothing from /usr/src", makefile.display());
    fs::write(&makefile, moved)?;
    Ok(dir)
}

/// Answers a directory with the modules, without debug information.
fn build(work: &Path, headers: &Path) -> Result<PathBuf> {
    eprintln!("== building the modules");
    let tree = work.join(SOURCE_PACKAGE);
    // The kernel has this tree without the iterator, which iommufd therefore brings along; its symbols stay its own.
    let iterator = fs::read_to_string(tree.join("lib/interval_tree.c"))?;
    let own: Vec<&str> = iterator.lines().filter(|line| !line.starts_with("EXPORT_SYMBOL")).collect();
    fs::write(tree.join("drivers/iommu/iommufd/interval_tree.c"), own.join("\n"))?;
    let mut makefile = fs::OpenOptions::new().append(true).open(tree.join("drivers/iommu/iommufd/Makefile"))?;
    writeln!(makefile, "iommufd-y += interval_tree.o")?;
    fs::write(tree.join("Kbuild"), "obj-m := drivers/iommu/iommufd/ drivers/vfio/\n")?;

    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    let flags: Vec<String> = SWITCHES.iter().map(|(_, define)| format!("-D{define}=1")).collect();
    run(Command::new("make")
        .arg("-C")
        .arg(headers)
        .arg(format!("M={}", tree.display()))
        .args(SWITCHES.map(|(switch, _)| switch))
        // Type information for BPF would need one more program.
        .arg("CONFIG_DEBUG_INFO_BTF_MODULES=")
        .arg(format!("KCFLAGS={}", flags.join(" ")))
        .args([&format!("-j{jobs}"), "modules"]))
    .context("Build the modules")?;
    let built = work.join("built");
    fs::create_dir(&built)?;
    for module in BUILT {
        let to = built.join(name_of(module));
        run(Command::new("strip").arg("--strip-debug").arg("-o").arg(&to).arg(tree.join(module)))?;
    }
    Ok(built)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_of_one_version_are_found_in_what_apt_says() {
        let text = "Package: linux-headers-6.12.1+x-cloud-amd64\nVersion: 6.12.1-1~x\n\
                    Depends: linux-base, linux-headers-6.12.1+x-common (= 6.12.1-1~x), linux-image-6.12.1+x-cloud-amd64 (= 1) | y, \
                    linux-kbuild-6.12.1+x, gcc-12\n";
        let (version, needed) = needs(text).unwrap();
        assert_eq!(version, "6.12.1-1~x");
        assert_eq!(needed, ["linux-headers-6.12.1+x-common", "linux-kbuild-6.12.1+x"]);
        assert!(needs("Version: 1\nDepends: linux-base\n").is_err());
        assert!(needs("").is_err());
    }

    #[test]
    fn debians_modules_give_way_to_ours_of_the_same_name() {
        assert!(is_replaced(Path::new("/k/drivers/vfio/vfio.ko.xz")));
        assert!(is_replaced(Path::new("/k/drivers/vfio/pci/vfio-pci.ko.xz")));
        assert!(!is_replaced(Path::new("/k/virt/lib/irqbypass.ko.xz")));
    }
}
