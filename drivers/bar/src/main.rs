//! The driver as a program of its own: all that its image holds (services/deploy).

use std::process::ExitCode;

fn main() -> ExitCode {
    uhmm_driver_kit::main(uhmm_driver_bar::run)
}
