//! A network of a test's own: another machine, as far as packets can tell, that can be cut off. It ends with this value, and with the test's process.

use std::io::Read;
use std::net::Ipv4Addr;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// A network namespace with one address, and a cable to it.
pub struct Network {
    /// Holds the namespace: ends when its standard input does.
    holder: Child,
    address: Ipv4Addr,
}

/// `program` of the package, with its arguments.
fn command(program: &str, package: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output();
    let output =
        output.unwrap_or_else(|error| panic!("{program}: {error}: run `apt-get install {package}`, or tests/run"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}, which needs root and CONFIG_VETH: {said}");
}

fn ip(args: &str) {
    command("ip", "iproute2", &args.split(' ').collect::<Vec<_>>());
}

impl Network {
    /// Root only.
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        // Networks of four addresses in the range that is kept for measurements (198.18.0.0/15): other tests have others.
        let index = (std::process::id() * 4 + COUNT.fetch_add(1, Ordering::Relaxed)) % (1 << 15);
        let near = Ipv4Addr::from((198 << 24) + (18 << 16) + index * 4 + 1);
        let address = Ipv4Addr::from(u32::from(near) + 1);
        let mut unshare = Command::new("unshare");
        unshare.args(["--net", "--", "sh", "-c", "echo; exec cat"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut holder = unshare.spawn().expect("unshare, of the package util-linux");
        // It has its namespace when it says something.
        let mut stdout = holder.stdout.take().expect("stdout is piped");
        stdout.read_exact(&mut [0]).expect("unshare --net, which needs root");
        let cable = format!("uhmm{index}");
        let network = Self { holder, address };
        ip(&format!("link add {cable} type veth peer name far netns {}", network.holder.id()));
        ip(&format!("address add {near}/30 dev {cable}"));
        ip(&format!("link set {cable} up"));
        network.inside(&format!("ip address add {address}/30 dev far"));
        network.inside("ip link set far up");
        network
    }

    /// Of the machine that is not here.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// What makes a command run there: put in front of it. The process is the command's own.
    pub fn prefix(&self) -> Vec<String> {
        ["nsenter", "--target", &self.holder.id().to_string(), "--net", "--"].map(str::to_owned).to_vec()
    }

    fn inside(&self, words: &str) {
        let prefix = self.prefix();
        let args = prefix[1..].iter().map(String::as_str).chain(words.split(' ')).collect::<Vec<_>>();
        command(&prefix[0], "util-linux", &args);
    }

    /// Packets vanish from now on, both ways; nobody is told.
    pub fn cut(&self) {
        self.inside("ip link set far down");
    }

    /// As before.
    pub fn mend(&self) {
        self.inside("ip link set far up");
    }
}

impl Default for Network {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // It may have ended by itself, which is as good.
        drop(self.holder.kill());
        drop(self.holder.wait());
    }
}
