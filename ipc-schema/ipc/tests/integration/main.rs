//! Reactors, shared tables and hostile peers, over real sockets and real threads.

mod agent;
mod hostile;
mod links;
mod shared;
mod support;
