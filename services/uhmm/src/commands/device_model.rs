//! `uhmm device-model`: plays a PCI device for drivers in other processes, until it is killed or the device is pulled out.
//!
//! Killing it is the surprise removal of the device. A driver that goes and comes back finds the device as it was.

use std::path::PathBuf;
use std::sync::mpsc;

use anyhow::Context;
use uhmm_manifest::ByteSize;
use uhmm_models::accel::Accel;
use uhmm_models::block::{BlockOptions, BlockOrder, BlockServer};
use uhmm_models::faults::{FaultPlan, PlannedFault};
use uhmm_models::nvme::{NvmeModel, NvmeOptions};
use uhmm_models::{DeviceModel, Machine, Server};

use crate::Log;
use crate::commands::model_orders::{Control, serve_block};

/// Which device.
#[derive(clap::Subcommand)]
pub enum Model {
    /// A block server (NBD) for driver "nbd", which does wrong on order
    Block(BlockArgs),
    /// An accelerator: memory behind BAR 2, and a copy engine
    Accel {
        /// Its memory, a power of two
        #[arg(long, default_value = "256MiB")]
        memory: ByteSize,
        #[command(flatten)]
        common: ModelArgs,
    },
    /// An NVMe controller with one namespace, which is empty at first and lives as long as this process
    Nvme {
        /// Size of the namespace
        #[arg(long, default_value = "256MiB")]
        memory: ByteSize,
        /// Bytes of a block
        #[arg(long, default_value = "512", value_parser = ["512", "4096"])]
        block: String,
        /// Size of the controller memory buffer, a power of two of at least 1 MiB; without it there is none
        #[arg(long, default_value = "0")]
        cmb: ByteSize,
        #[command(flatten)]
        common: ModelArgs,
    },
}

/// What `uhmm device-model block` takes.
#[derive(clap::Args)]
pub struct BlockArgs {
    /// Size of the export
    #[arg(long, default_value = "256MiB")]
    memory: ByteSize,
    /// Where it listens: url = "nbd+unix:///?socket=PATH"
    #[arg(long, required_unless_present = "tcp")]
    socket: Option<PathBuf>,
    /// Or a loopback address, as in 127.0.0.1:10809
    #[arg(long, conflicts_with = "socket")]
    tcp: Option<std::net::SocketAddr>,
    /// Where its bytes are, so that they outlive it; without it in memory
    #[arg(long)]
    file: Option<PathBuf>,
    /// Name of the export
    #[arg(long, default_value = "")]
    export: String,
    /// Refuses writes
    #[arg(long)]
    read_only: bool,
    /// Answers reads in the old way
    #[arg(long)]
    no_structured: bool,
    /// Does not say that several connections see the same
    #[arg(long)]
    no_multi_conn: bool,
    /// What goes wrong with which request (late@17), or with how many of a thousand (late=5): drop, drop-answer, delay, late, reorder,
    /// duplicate, corrupt, lie, error, full, cut, wrong-magic, wrong-handle, too-long, half; may be given several times
    #[arg(long = "fault", value_name = "FAULT@N|FAULT=N")]
    faults: Vec<BlockOrder>,
    /// How long "late" and "delay" are
    #[arg(long, default_value = "1000")]
    late_ms: u64,
    /// Take orders on standard input, one a line, and answer each with a line of JSON: fault FAULT@N, late-ms N, size BYTES, cut, counters
    #[arg(long)]
    orders: bool,
    /// Log format
    #[arg(long, value_enum, default_value_t = Log::Text)]
    log: Log,
}

fn block_server(args: BlockArgs) -> anyhow::Result<()> {
    uhmm_kit::init_log(args.log.into(), "block", 0);
    let server = BlockServer::new(BlockOptions {
        size: args.memory.0,
        file: args.file,
        export: args.export,
        read_only: args.read_only,
        structured: !args.no_structured,
        multi_conn: !args.no_multi_conn,
        late: std::time::Duration::from_millis(args.late_ms),
        ..BlockOptions::default()
    })?;
    args.faults.iter().for_each(|order| server.order(*order));
    if args.orders {
        let server = server.clone();
        std::thread::Builder::new().name("orders".into()).spawn(move || {
            let ended = serve_block(&server, std::io::stdin().lock(), std::io::stdout());
            tracing::info!(?ended, "No more orders");
        })?;
    }
    match (args.socket, args.tcp) {
        (Some(socket), _) => server.serve_unix(&socket, || uhmm_kit::say("ready"))?,
        (None, Some(address)) => server.serve_tcp(address, |_| uhmm_kit::say("ready"))?,
        (None, None) => anyhow::bail!("Say where it listens: --socket PATH or --tcp ADDRESS"),
    }
    Ok(())
}

/// What all models have.
#[derive(clap::Args)]
pub struct ModelArgs {
    /// Where it listens; `pci = "vfio-user:PATH"` in the manifest
    #[arg(long)]
    socket: PathBuf,
    /// What goes wrong and with which command, e.g. drop-completion@17 (also command-error, stuck-queue, corrupt-id, removal, stray-dma);
    /// may be given several times
    #[arg(long = "fault", value_name = "FAULT@N")]
    faults: Vec<PlannedFault>,
    /// Take orders on standard input, one a line, and answer each with a line of JSON: fault KIND@N (counted from then on), latency-us N,
    /// counters, unplug
    #[arg(long)]
    orders: bool,
    /// Log format
    #[arg(long, value_enum, default_value_t = Log::Text)]
    log: Log,
}

impl Model {
    fn parts(self) -> anyhow::Result<(&'static str, Box<dyn DeviceModel>, Control, ModelArgs)> {
        Ok(match self {
            Self::Block(_) => anyhow::bail!("A block server is no PCI device"),
            Self::Accel { memory, common } => {
                let faults = FaultPlan::default();
                ("accel", Box::new(Accel::new(memory.0, faults.clone())?), Control::Accel(faults), common)
            }
            Self::Nvme { memory, block, cmb, common } => {
                let block_shift = if block == "4096" { 12 } else { 9 };
                let options =
                    NvmeOptions { len_bytes: memory.0, block_shift, cmb_bytes: cmb.0, ..NvmeOptions::default() };
                let (model, control) = NvmeModel::new(options)?;
                ("nvme", Box::new(model), Control::Nvme(control), common)
            }
        })
    }
}

/// Prints `ready` when drivers can connect.
pub fn device_model(model: Model) -> anyhow::Result<()> {
    let model = match model {
        Model::Block(args) => return block_server(args),
        other => other,
    };
    let (name, model, control, args) = model.parts()?;
    args.faults.iter().for_each(|planned| control.inject(*planned));
    uhmm_kit::init_log(args.log.into(), name, 0);
    let machine = Machine::start(model)?;
    let server = Server::bind(&args.socket, machine.clone())?;
    let (tell, ended) = mpsc::channel();
    let served = machine.clone();
    std::thread::Builder::new().name("server".into()).spawn(move || {
        let end = server.run().map(|never| match never {});
        // Whoever waits for a removal learns it here too; without the receiver the process is ending anyway.
        if tell.send(end).is_ok() {
            served.remove();
        }
    })?;
    uhmm_kit::say("ready");
    if args.orders {
        let machine = machine.clone();
        std::thread::Builder::new().name("orders".into()).spawn(move || {
            let ended = control.serve(&machine, std::io::stdin().lock(), std::io::stdout());
            tracing::info!(?ended, "No more orders");
        })?;
    }
    machine.wait_removed();
    match ended.try_recv() {
        Ok(end) => end.with_context(|| format!("Device model {name} ended")),
        Err(_) => anyhow::bail!("Device model {name} was pulled out"),
    }
}
