//! The program around a driver: command line in, exit status out.

use std::io::Write as _;
use std::process::ExitCode;

use uhmm_kernel_hook::error::chain;
use uhmm_kit::ServiceArgs;

use crate::DriverError;

/// All of a driver's `fn main`, if the driver is a program of its own: `run` is what begins with the arguments that the supervisor passes, or
/// the command of an image. What goes wrong is told in one line.
pub fn main(run: impl FnOnce(ServiceArgs) -> Result<(), DriverError>) -> ExitCode {
    let done = match ServiceArgs::from_command_line() {
        Ok(args) => run(args).map_err(|error| chain(&error)),
        Err(error) => Err(chain(&error)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(told) => {
            // Nobody reads it where it cannot be written.
            drop(writeln!(std::io::stderr(), "Error: {told}"));
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_told_with_its_causes_in_one_line() {
        let cause = std::io::Error::other("the cable is out");
        let error = DriverError::Open { device: "chip0".to_owned(), source: cause.into() };
        let told = chain(&error);
        assert!(told.contains("chip0") && told.ends_with(": the cable is out") && !told.contains('\n'), "{told}");
    }
}
