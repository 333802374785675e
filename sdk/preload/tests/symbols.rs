//! What the preloaded library gives to the program's symbols: nothing. A symbol that it exported would stand in for the program's own.

use object::{Object, ObjectSymbol};

/// Rust exports these of a cdylib only when a crate below says so; none of them is a name of the C library's.
#[test]
fn the_library_interposes_no_symbol() {
    let test = std::env::current_exe().expect("the test knows its own path");
    let library = test.parent().expect("tests lie in target/PROFILE/deps").join("libuhmm_preload.so");
    let bytes = std::fs::read(&library).unwrap_or_else(|error| panic!("{}: {error}", library.display()));
    let file = object::File::parse(&*bytes).expect("an ELF file");
    let exported: Vec<&str> = file
        .dynamic_symbols()
        .filter(|symbol| symbol.is_definition() && symbol.is_global())
        .filter_map(|symbol| symbol.name().ok())
        .collect();
    assert!(exported.is_empty(), "exported: {exported:?}");
    assert!(file.dynamic_symbols().any(|symbol| symbol.is_undefined()), "no symbols were read");
}
