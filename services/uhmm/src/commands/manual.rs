//! `uhmm man` and `uhmm completions`: both from the definitions of the command line, so that neither can say anything else.

use std::io::Write;
use std::path::Path;

use anyhow::Context;
use clap::Command;

/// One page a command, `uhmm.1`, `uhmm-up.1` and so on; what is hidden has none.
pub fn man(command: Command, dir: &Path) -> anyhow::Result<()> {
    clap_mangen::generate_to(visible(command), dir)
        .with_context(|| format!("The manual cannot be written to {}: give a folder that exists", dir.display()))
}

/// To standard output.
pub fn completions(command: Command, shell: clap_complete::Shell) -> anyhow::Result<()> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut visible(command), "uhmm", &mut text);
    std::io::stdout().write_all(&text).context("The completions cannot be written")
}

/// Without services' own commands, which the supervisor alone gives.
fn visible(command: Command) -> Command {
    let shown: Vec<Command> =
        command.get_subcommands().filter(|sub| !sub.is_hide_set()).cloned().map(visible).collect();
    let mut copy = Command::new(command.get_name().to_owned()).args(command.get_arguments().cloned());
    if let Some(about) = command.get_about() {
        copy = copy.about(about.clone());
    }
    if let Some(about) = command.get_long_about() {
        copy = copy.long_about(about.clone());
    }
    if let Some(version) = command.get_version() {
        copy = copy.version(version.to_owned());
    }
    copy.subcommands(shown)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn every_visible_command_has_a_page_and_no_hidden_one() {
        let dir = std::env::temp_dir().join(format!("uhmm-man-{}", std::process::id()));
        std::fs::create_dir(&dir).expect("a folder");
        man(crate::Cli::command(), &dir).expect("pages");
        let mut pages: Vec<String> = std::fs::read_dir(&dir)
            .expect("the folder")
            .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
            .collect();
        std::fs::remove_dir_all(&dir).expect("removed");
        pages.sort();
        for sub in crate::Cli::command().get_subcommands() {
            let page = format!("uhmm-{}.1", sub.get_name());
            assert_eq!(pages.contains(&page), !sub.is_hide_set(), "{page} of {pages:?}");
        }
        assert!(pages.contains(&"uhmm-driver-new.1".to_owned()) && !pages.contains(&"uhmm-driver-soft.1".to_owned()));
    }

    #[test]
    fn a_page_has_what_the_help_has() {
        let mut page = Vec::new();
        let mut up = visible(crate::Cli::command()).find_subcommand("up").expect("up").clone();
        up.build();
        clap_mangen::Man::new(up).render(&mut page).expect("a page");
        let page = String::from_utf8(page).expect("text").replace('\\', "");
        assert!(page.contains("--adopt") && page.contains("Take over services"), "{page}");
    }
}
