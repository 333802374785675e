//! `uhmm top`: state ([`state`]) and picture ([`view`]), both pure. A sample or a key goes in; a picture or an action comes out.

pub mod picture;
pub mod state;
pub mod view;

#[cfg(test)]
mod tests;
