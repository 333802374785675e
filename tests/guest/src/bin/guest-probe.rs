//! What a driver's container of the guest can reach: `guest-probe PCI_ADDRESS GROUP SECRET OTHER_GROUP=MAJOR:MINOR...`, in the bundle of that device's driver.
//! Its group it can open; whatever else it tries must fail. A line a try, and "all denied" at the end.

use std::fs;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use uhmm_kernel_hook::SeqPacket;

fn denied<T>(what: &str, tried: io::Result<T>) -> Result<()> {
    match tried {
        Ok(_) => bail!("{what} is possible"),
        Err(error) => println!("denied {what}: {error}"),
    }
    Ok(())
}

fn open(path: &str) -> io::Result<fs::File> {
    fs::OpenOptions::new().read(true).write(true).open(path)
}

fn names(folder: &str) -> Result<Vec<String>> {
    let entries = fs::read_dir(folder).with_context(|| format!("Read {folder}"))?;
    let mut names: Vec<String> =
        entries.map(|entry| Ok(entry?.file_name().into_string().unwrap_or_default())).collect::<Result<_>>()?;
    names.sort();
    Ok(names)
}

/// What it was given is there, and nothing beside it.
fn given(address: &str, group: &str) -> Result<()> {
    open("/dev/vfio/vfio").context("Its container interface")?;
    open(&format!("/dev/vfio/{group}")).context("Its group")?;
    let mut nodes = vec![group.to_owned(), "vfio".to_owned()];
    nodes.sort();
    ensure!(names("/dev/vfio")? == nodes, "/dev/vfio has {:?}", names("/dev/vfio")?);
    ensure!(names("/sys/bus/pci/devices")? == [address], "sysfs shows {:?}", names("/sys/bus/pci/devices")?);
    ensure!(names("/sys")? == ["bus"] && names("/sys/bus")? == ["pci"], "sysfs has {:?}", names("/sys")?);
    let status = fs::read_to_string("/proc/self/status")?;
    for kind in ["CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb"] {
        ensure!(status.contains(&format!("{kind}:\t0000000000000000")), "{kind} is not empty: {status}");
    }
    for line in ["NoNewPrivs:\t1", "Seccomp:\t2", "Uid:\t61003\t61003\t61003\t61003"] {
        ensure!(status.contains(line), "{line:?} is missing in {status}");
    }
    Ok(())
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [address, group, secret, others @ ..] = args.as_slice() else {
        bail!("Give address, group, secret, other groups")
    };
    given(address, group)?;
    ensure!(!others.is_empty(), "there is no other group to try");
    for (index, other) in others.iter().enumerate() {
        let (other, numbers) = other.split_once('=').context("GROUP=MAJOR:MINOR")?;
        let (major, minor) = numbers.split_once(':').context("MAJOR:MINOR")?;
        denied(&format!("group {other}"), open(&format!("/dev/vfio/{other}")))?;
        let device = makedev(major.parse()?, minor.parse()?);
        for folder in ["/dev", "/tmp"] {
            let node = format!("{folder}/own{index}");
            let made = mknodat(CWD, &node, FileType::CharacterDevice, Mode::RUSR | Mode::WUSR, device);
            denied(&format!("a node of its own of group {other} in {folder}"), made.map_err(io::Error::from))?;
        }
    }
    for node in ["/dev/userfaultfd", "/dev/mem", "/dev/iommu", "/dev/kmsg", "/dev/ttyS0"] {
        denied(node, open(node))?;
    }
    denied("a file of the machine", fs::read(secret))?;
    denied(
        "another driver's socket",
        SeqPacket::connect(Path::new("/run/uhmm/driver-other0.sock")).map_err(io::Error::other),
    )?;
    denied("the network", TcpStream::connect("127.0.0.1:1"))?;
    denied("a listening port", TcpListener::bind("127.0.0.1:0"))?;
    denied("a file of its own", fs::write("/tmp/x", "x"))?;
    denied("a setting of the kernel", fs::write("/proc/sys/kernel/core_pattern", "x"))?;
    let own = std::process::id().to_string();
    let seen = names("/proc")?.into_iter().filter(|name| name.parse::<u32>().is_ok() && *name != own).count();
    ensure!(seen == 0, "it sees {seen} other processes");
    println!("all denied");
    Ok(())
}
