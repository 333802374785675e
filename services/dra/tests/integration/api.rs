//! An API server, as far as a DRA driver sees one: ResourceClaims, ResourceSlices and a node, over HTTP on loopback, with the rules that the real one
//! insists on: a token, versions of what is replaced, generations that grow.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// What the driver must show.
pub const TOKEN: &str = "a-token";
pub const NODE: &str = "node-1";
const SLICES: &str = "/apis/resource.k8s.io/v1/resourceslices";
const PATIENCE: Duration = Duration::from_secs(30);

/// What is stored, and what happens to requests.
#[derive(Default)]
pub struct State {
    /// By namespace/name.
    pub claims: BTreeMap<String, Value>,
    /// By name.
    pub slices: BTreeMap<String, Value>,
    /// Answers 503 to everything.
    pub away: bool,
    /// Requests for claims wait as long as this is so.
    pub hold: bool,
    /// How many do.
    pub held: usize,
    /// Replacements that are refused as if somebody else had been faster.
    pub conflicts: u32,
    /// Every request: method and path.
    pub log: Vec<String>,
    version: u64,
}

/// A running one. It ends with the test.
pub struct ApiServer {
    shared: Arc<(Mutex<State>, Condvar)>,
    addr: SocketAddr,
}

type Shared = Arc<(Mutex<State>, Condvar)>;
/// What is spoken over a connection: nothing or TLS.
pub type Wrap = Arc<dyn Fn(TcpStream) -> Box<dyn Stream> + Send + Sync>;

/// Both ways.
pub trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

impl ApiServer {
    /// Plain.
    pub fn start() -> Self {
        Self::start_with(Arc::new(|stream| Box::new(stream)))
    }

    /// With something around it.
    pub fn start_with(wrap: Wrap) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let addr = listener.local_addr().expect("its address");
        let shared = Shared::default();
        let for_thread = shared.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (shared, wrap) = (for_thread.clone(), wrap.clone());
                let stream = stream.expect("a connection");
                std::thread::spawn(move || serve(&mut *wrap(stream), &shared));
            }
        });
        Self { shared, addr }
    }

    pub fn port(&self) -> u16 {
        self.addr.port()
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.shared.0.lock().expect("no test thread panics with it")
    }

    /// Changes something, and wakes whoever waits for that.
    pub fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state());
        self.shared.1.notify_all();
    }

    /// Waits until something is so.
    pub fn wait<T>(&self, what: &str, mut look: impl FnMut(&State) -> Option<T>) -> T {
        let until = Instant::now() + PATIENCE;
        let mut state = self.state();
        loop {
            if let Some(found) = look(&state) {
                return found;
            }
            let left = until.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{what}: {:#?} {:?}", state.slices, state.log);
            state = self.shared.1.wait_timeout(state, left).expect("not poisoned").0;
        }
    }

    /// An allocated claim, as the scheduler leaves it.
    pub fn allocate(&self, name: &str, shares: &[(&str, &str)]) {
        let result = |(index, (device, bytes)): (usize, &(&str, &str))| {
            json!({
                "request": format!("r{index}"), "driver": "uhmm.internal", "pool": NODE, "device": device,
                "shareID": format!("share-{name}-{index}"), "consumedCapacity": { "memory": bytes },
            })
        };
        self.put_claim(name, json!(shares.iter().enumerate().map(result).collect::<Vec<_>>()));
    }

    /// Any claim.
    pub fn put_claim(&self, name: &str, results: Value) {
        let claim = json!({
            "apiVersion": "resource.k8s.io/v1", "kind": "ResourceClaim",
            "metadata": { "name": name, "namespace": "default", "uid": format!("uid-{name}") },
            "spec": { "devices": { "requests": [] } },
            "status": { "allocation": { "devices": { "results": results } } },
        });
        self.change(|state| drop(state.claims.insert(format!("default/{name}"), claim)));
    }

    /// Devices of the node's only slice, and its generation, once there is one.
    pub fn offered(state: &State) -> Option<(BTreeMap<String, Value>, u64)> {
        let slice = state.slices.values().next()?;
        let devices = slice["spec"]["devices"].as_array();
        let by_name = devices
            .into_iter()
            .flatten()
            .map(|device| (device["name"].as_str().expect("text").to_owned(), device.clone()));
        Some((by_name.collect(), slice["spec"]["pool"]["generation"].as_u64().expect("a number")))
    }
}

/// One request, one answer.
fn serve(stream: &mut dyn Stream, shared: &Shared) {
    let mut reader = BufReader::new(&mut *stream);
    let mut line = String::new();
    if reader.read_line(&mut line).unwrap_or(0) == 0 {
        return;
    }
    let mut words = line.split(' ');
    let (method, path) = (words.next().unwrap_or_default().to_owned(), words.next().unwrap_or_default().to_owned());
    let (mut length, mut authorized) = (0, false);
    loop {
        let mut header = String::new();
        if reader.read_line(&mut header).unwrap_or(0) == 0 {
            return;
        }
        let header = header.trim().to_owned();
        let Some((name, value)) = header.split_once(':') else { break };
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.trim().parse().expect("a number"),
            "authorization" => authorized = value.trim() == format!("Bearer {TOKEN}"),
            _ => {}
        }
    }
    let mut body = vec![0; length];
    if reader.read_exact(&mut body).is_err() {
        return;
    }
    drop(reader);
    let (status, answer) = if authorized {
        answer(shared, &method, &path, serde_json::from_slice(&body).unwrap_or_default())
    } else {
        refuse(401, "Unauthorized")
    };
    let text = answer.to_string();
    let head = format!("HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {}\r\n", text.len());
    // Whoever asked may be dead.
    let _ = stream.write_all(format!("{head}connection: close\r\n\r\n{text}").as_bytes());
    let _ = stream.flush();
}

fn refuse(status: u16, message: &str) -> (u16, Value) {
    (status, json!({ "kind": "Status", "status": "Failure", "message": message, "code": status }))
}

fn answer(shared: &Shared, method: &str, path: &str, body: Value) -> (u16, Value) {
    let mut state = shared.0.lock().expect("not poisoned");
    state.log.push(format!("{method} {path}"));
    shared.1.notify_all();
    if path.contains("/resourceclaims/") && state.hold {
        state.held += 1;
        shared.1.notify_all();
        while state.hold {
            state = shared.1.wait(state).expect("not poisoned");
        }
        state.held -= 1;
    }
    if state.away {
        return (503, Value::Null);
    }
    let (path, query) = path.split_once('?').unwrap_or((path, ""));
    let result = match (method, path.strip_prefix(SLICES)) {
        ("GET", Some("")) => {
            assert_eq!(query, format!("fieldSelector=spec.driver%3Duhmm.internal%2Cspec.nodeName%3D{NODE}"));
            (200, json!({ "items": state.slices.values().collect::<Vec<_>>() }))
        }
        ("POST", Some("")) => state.create(body),
        ("PUT", Some(name)) => state.replace(name.trim_start_matches('/'), body),
        ("DELETE", Some(name)) => match state.slices.remove(name.trim_start_matches('/')) {
            Some(_) => (200, json!({})),
            None => refuse(404, "not found"),
        },
        ("GET", None) if path == format!("/api/v1/nodes/{NODE}") => (200, json!({ "metadata": { "uid": "node-uid" } })),
        ("GET", None) => {
            let rest = path.strip_prefix("/apis/resource.k8s.io/v1/namespaces/").unwrap_or_default();
            let claim = state.claims.get(&rest.replace("/resourceclaims/", "/")).cloned();
            claim.map_or_else(|| refuse(404, "not found"), |claim| (200, claim))
        }
        _ => refuse(405, "no such request"),
    };
    shared.1.notify_all();
    result
}

impl State {
    fn create(&mut self, mut slice: Value) -> (u16, Value) {
        let name = slice["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        if self.slices.contains_key(&name) {
            return refuse(409, "already exists");
        }
        self.version += 1;
        slice["metadata"]["resourceVersion"] = self.version.to_string().into();
        self.slices.insert(name, slice.clone());
        (201, slice)
    }

    fn replace(&mut self, name: &str, mut slice: Value) -> (u16, Value) {
        let Some(old) = self.slices.get(name) else { return refuse(404, "not found") };
        if self.conflicts > 0 || old["metadata"]["resourceVersion"] != slice["metadata"]["resourceVersion"] {
            self.conflicts = self.conflicts.saturating_sub(1);
            return refuse(409, "the object has been modified");
        }
        let generation = |slice: &Value| slice["spec"]["pool"]["generation"].as_u64();
        assert!(generation(&slice) > generation(old), "a change is another generation: {slice:#} {old:#}");
        self.version += 1;
        slice["metadata"]["resourceVersion"] = self.version.to_string().into();
        self.slices.insert(name.to_owned(), slice.clone());
        (200, slice)
    }
}
