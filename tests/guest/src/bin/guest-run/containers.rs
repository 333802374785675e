//! What the suite `containers` needs in the guest beside our own programs: the machine's own runc, and Python for `services/deploy/bundle`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// The suite that needs them.
pub const SUITE: &str = "containers";
const PROGRAMS: [&str; 2] = ["/usr/sbin/runc", "/usr/bin/python3"];
const BUNDLE: &str = "services/deploy/bundle";
/// The files of all modules that the tool has loaded when it has said how it is used.
const MODULES: &str = "
import runpy, sys
tool, sys.argv = sys.argv[1], ['bundle', '--help']
sys.stdout = sys.stderr
try:
    runpy.run_path(tool, run_name='__main__')
except SystemExit:
    pass
sys.stdout = sys.__stdout__
print(*{m.__file__ for m in list(sys.modules.values()) if getattr(m, '__file__', None)}, sep='\\n')
";

/// Path inside the guest, and the file here.
pub fn files() -> Result<BTreeMap<PathBuf, PathBuf>> {
    let mut files = BTreeMap::new();
    for program in PROGRAMS {
        let program = Path::new(program);
        ensure!(program.exists(), "{} is missing: apt-get install -y runc python3", program.display());
        for library in lines(Command::new("ldd").arg(program))? {
            // `name => /path (address)`, or `/path (address)`.
            let path = library.split_whitespace().find(|word| word.starts_with('/'));
            files.extend(path.map(|path| (PathBuf::from(path), PathBuf::from(path))));
        }
        files.insert(program.to_owned(), program.to_owned());
    }
    let mut python = Command::new(PROGRAMS[1]);
    let modules = lines(python.args(["-I", "-S", "-c", MODULES, BUNDLE]))?;
    ensure!(modules.iter().any(|path| path.ends_with("/json/__init__.py")), "Python has told no modules: {modules:?}");
    // Extensions with libraries of their own (compression) are done without.
    let wanted = modules.into_iter().filter(|path| path.ends_with(".py") || path.contains("/resource."));
    files.extend(wanted.map(|path| (PathBuf::from(&path), PathBuf::from(path))));
    files.insert(Path::new("/").join(BUNDLE), BUNDLE.into());
    Ok(files)
}

fn lines(command: &mut Command) -> Result<Vec<String>> {
    let output = command.output().with_context(|| format!("Start {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout).context("Paths are text")?.lines().map(str::to_owned).collect())
}
