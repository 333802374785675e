//! Orders for a model that runs (`uhmm device-model ... --orders`): one a line on standard input, each answered with a line of JSON on standard
//! output.
//!
//! | order | answer | what |
//! | --- | --- | --- |
//! | `fault drop-completion@3` | `{}` | the third command from now on meets it; the kinds are those of `--fault` |
//! | `latency-us 500` | `{}` | commands take at least so long from now on (NVMe) |
//! | `counters` | `{"enables":1,...}` | what the device has seen since it was made |
//! | `unplug` | `{}` | surprise removal; the model ends |
//! | anything else | `{"error":"..."}` | nothing |
//!
//! Those of a block server: `fault late@3`, `fault lie=5`, `late-ms 2000`, `size 1048576`, `cut` (every connection), `counters`.
//!
//! When the input ends the model goes on without orders.

use std::io::{BufRead, Write};
use std::time::Duration;

use serde_json::{Value, json};
use uhmm_models::Machine;
use uhmm_models::block::BlockServer;
use uhmm_models::faults::{FaultPlan, PlannedFault};
use uhmm_models::nvme::NvmeControl;

/// What an order can reach.
pub enum Control {
    Accel(FaultPlan),
    Nvme(NvmeControl),
}

impl Control {
    /// Counted from now on.
    pub fn inject(&self, planned: PlannedFault) {
        match self {
            Self::Accel(plan) => plan.inject(planned.at_command, planned.fault),
            Self::Nvme(control) => control.inject(planned.at_command, planned.fault.into()),
        }
    }

    fn counters(&self, machine: &Machine) -> Value {
        match self {
            Self::Accel(_) => json!({ "dma_faults": machine.dma_fault_count() }),
            Self::Nvme(control) => {
                let seen = control.counters();
                json!({
                    "enables": seen.enables, "function_resets": seen.function_resets, "io_commands": seen.io_commands,
                    "transfers": seen.transfers, "flushes": seen.flushes, "zeroings": seen.zeroings, "aborts": seen.aborts,
                    "dma_faults": machine.dma_fault_count(), "bad_doorbells": seen.bad_doorbells,
                })
            }
        }
    }

    fn obey(&self, order: &str, machine: &Machine) -> Result<Value, String> {
        let mut words = order.split_whitespace();
        let done = Ok(json!({}));
        match (words.next(), words.next(), words.next(), self) {
            (Some("fault"), Some(planned), None, _) => {
                self.inject(planned.parse().map_err(|error| format!("{error}"))?);
                done
            }
            (Some("latency-us"), Some(number), None, Self::Nvme(control)) => {
                let number = number.parse().map_err(|_| format!("{number:?} is no number of microseconds"))?;
                control.set_latency(Duration::from_micros(number));
                done
            }
            (Some("counters"), None, ..) => Ok(self.counters(machine)),
            (Some("unplug"), None, ..) => {
                machine.remove();
                done
            }
            _ => Err(format!("{order:?} is no order: write fault KIND@N, latency-us N (NVMe), counters or unplug")),
        }
    }

    /// Obeys until the input ends.
    ///
    /// # Errors
    /// The input cannot be read or the output not be written.
    pub fn serve(&self, machine: &Machine, input: impl BufRead, mut output: impl Write) -> std::io::Result<()> {
        for order in input.lines() {
            let answer = self.obey(&order?, machine).unwrap_or_else(|error| json!({ "error": error }));
            writeln!(output, "{answer}")?;
            output.flush()?;
        }
        Ok(())
    }
}

fn obey_block(order: &str, server: &BlockServer) -> Result<Value, String> {
    let number = |word: &str| word.parse::<u64>().map_err(|_| format!("{word:?} is no number"));
    match order.split_whitespace().collect::<Vec<_>>()[..] {
        ["fault", planned] => server.order(planned.parse()?),
        ["late-ms", count] => server.set_late(Duration::from_millis(number(count)?)),
        ["size", bytes] => server.set_size(number(bytes)?),
        ["cut"] => server.cut(),
        ["counters"] => {
            let seen = server.counters();
            return Ok(json!({
                "connections": seen.connections, "reads": seen.reads, "writes": seen.writes, "trims": seen.trims,
                "faults": seen.faults, "late_writes": seen.late_writes,
            }));
        }
        _ => return Err(format!("{order:?} is no order: write fault FAULT@N, late-ms N, size BYTES, cut or counters")),
    }
    Ok(json!({}))
}

/// As [`Control::serve`], for a block server.
pub fn serve_block(server: &BlockServer, input: impl BufRead, mut output: impl Write) -> std::io::Result<()> {
    for order in input.lines() {
        let answer = obey_block(&order?, server).unwrap_or_else(|error| json!({ "error": error }));
        writeln!(output, "{answer}")?;
        output.flush()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use uhmm_models::nvme::{NvmeModel, NvmeOptions};

    #[test]
    fn each_order_is_answered_with_a_line() {
        let (model, control) = NvmeModel::new(NvmeOptions::default()).expect("a model");
        let machine = Machine::start(Box::new(model)).expect("a machine");
        let orders = "counters\nfault stuck-queue@2\nfault nothing@2\nlatency-us 7\nlatency-us x\n\nunplug\n";
        let mut output = Vec::new();
        Control::Nvme(control).serve(&machine, orders.as_bytes(), &mut output).expect("served");
        machine.wait_removed();
        let lines: Vec<Value> = output
            .split(|byte| *byte == b'\n')
            .filter(|line| !line.is_empty())
            .map(|line| serde_json::from_slice(line).expect("a line of JSON"))
            .collect();
        assert_eq!((lines.len(), &lines[0]["enables"], &lines[0]["io_commands"]), (7, &json!(0), &json!(0)));
        let refused: Vec<bool> = lines.iter().map(|line| line.get("error").is_some()).collect();
        assert_eq!(refused, [false, false, true, false, true, true, false], "{lines:?}");
        assert!(lines[2]["error"].as_str().is_some_and(|text| text.contains("drop-completion")), "{lines:?}");
    }
}
