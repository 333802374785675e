//! Reactors, shared tables and hostile peers, over real sockets and real threads.

mod hostile;
mod links;
mod shared;
mod support;
