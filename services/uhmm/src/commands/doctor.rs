//! `uhmm doctor`: what this kernel and account offer, what is missing, what follows, and the command that fixes it.

use std::process::ExitCode;

use uhmm_kernel_hook::Probe;
use uhmm_kernel_hook::probe::Status;

/// Prints the report. Fails when something is missing without which nothing works.
pub fn doctor() -> ExitCode {
    let probe = Probe::run();
    println!("Kernel {}, user id {}\n", probe.kernel_release, probe.uid);
    let mut usable = true;
    for item in &probe.items {
        let mark = match item.status {
            Status::Yes => "yes   ",
            Status::Partly => "partly",
            Status::No => "NO    ",
        };
        println!("{mark}  {:<28} {}", item.name, item.detail);
        if item.status == Status::Yes {
            continue;
        }
        println!("        so: {}", item.consequence);
        if !item.fix.is_empty() {
            println!("        fix: {}", item.fix);
        }
        usable &= !(item.required && item.status == Status::No);
    }
    if usable {
        println!("\nuhmm works here.");
        ExitCode::SUCCESS
    } else {
        println!("\nuhmm cannot work here until every required item marked NO is fixed.");
        ExitCode::FAILURE
    }
}
