//! The virtual machine: software emulation (no KVM), an Intel IOMMU, devices to drive.

use std::fs::File;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use uhmm_guest::wait::wait_or_kill;

use crate::kernel::Kernel;

const DISK_BYTES: u64 = 128 << 20;
/// All that can be emulated, but for two promises that do not hold here: `rep movsb` is no fast copy, it is done byte by byte. The
/// kernel would use it for every copy (pages from a file to staging: 11 us each instead of 2.3).
const CPU: &str = "max,-erms,-fsrm";

/// Boots with these words for pid 1 and waits until the guest has powered off. `None`: it was killed at the deadline.
pub fn boot(kernel: &Kernel, initramfs: &Path, out: &Path, limit: Duration, words: &str) -> Result<Option<ExitStatus>> {
    let disk = out.join("nvme.raw");
    File::create(&disk)?.set_len(DISK_BYTES)?;
    let (console, results) = (out.join("console.log"), out.join("results.jsonl"));
    for line in [&console, &results] {
        File::create(line).with_context(|| format!("Empty {}", line.display()))?;
    }
    eprintln!("== booting (console: {})", console.display());
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        .args(["-machine", "q35,kernel-irqchip=split", "-accel", "tcg,thread=multi", "-cpu", CPU])
        .args(["-smp", "2", "-m", "2G"])
        .arg("-kernel")
        .arg(&kernel.image)
        .arg("-initrd")
        .arg(initramfs)
        // cgroup.memory: the first container has the kernel patch its allocator for accounts of its own memory, while it runs (see BOOTS_MAX).
        // no_timer_check: where others want the processors too, the timer ticks too late to be believed ("timer doesn't work through
        // Interrupt-remapped IO-APIC": six boots of six at a load of 20 on two processors).
        .args([
            "-append",
            &format!("console=ttyS0 quiet panic=-1 intel_iommu=on no_timer_check cgroup.memory=nokmem,nosocket{words}"),
        ])
        .args(["-serial", &format!("file:{}", console.display())])
        .args(["-serial", &format!("file:{}", results.display())])
        // 48 bits: room for bus addresses that are a program's virtual addresses (39 is QEMU's default).
        .args(["-device", "intel-iommu,intremap=on,caching-mode=on,aw-bits=48"])
        .args(["-device", "edu", "-device", "edu"])
        .args(["-object", "memory-backend-memfd,id=plain,size=64M,share=on"])
        .args(["-device", "ivshmem-plain,memdev=plain"])
        .args(["-object", "memory-backend-memfd,id=other,size=64M,share=on"])
        .args(["-device", "ivshmem-plain,memdev=other"])
        .args(["-drive", &format!("file={},format=raw,if=none,id=n0", disk.display())])
        .args(["-device", "nvme,serial=uhmm0,drive=n0,cmb_size_mb=16,legacy-cmb=off"])
        .stdin(Stdio::null());
    let mut child =
        qemu.spawn().context("Start qemu-system-x86_64: install it with `apt-get install qemu-system-x86`")?;
    wait_or_kill(&mut child, limit).context("Wait for QEMU")
}
