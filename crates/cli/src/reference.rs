//! The reference page of the command line, `docs/reference/cli.md`, from the argument definitions.

use clap::{Command, CommandFactory};

use crate::args::Cli;

/// Returns the page as Markdown.
#[must_use]
pub fn markdown() -> String {
    let mut page =
        "# Command line\n\nGenerated from the argument definitions. Do not edit.\n".to_owned();
    let mut root = Cli::command();
    root.build();
    section(&mut root, "drumline", 2, &mut page);
    page.push_str(STATE_FOLDER);
    page
}

/// What [`crate::state::StateDir`] holds, for people.
const STATE_FOLDER: &str = "
## The state folder

`--state-dir`, `DRUMLINE_STATE_DIR`, or by default `$XDG_STATE_HOME/drumline` or
`~/.local/state/drumline`. One cluster at a time uses it; only its owner can read it.

| Path | Holds |
|---|---|
| `token` | the cluster's token, mode 0600; every API call needs it |
| `dashboard-key` | opens the dashboard's pages, to read and nothing more, mode 0600 |
| `lock` | the process id of the `drumline up` that uses the folder |
| `endpoint.json` | where the control plane, its metrics and the dashboard listen, while they do |
| `gateway.json` | where the gateway listens, while it does |
| `store.redb` | jobs and their history, unless `--store` names an etcd |
| `audit.jsonl` | who submitted and cancelled what |
| `log/*.log` | what the control plane, the agents and the gateway say |
| `nodes/NODE/` | each agent's own: specs, work folders and logs of its ranks |
| `shared/` | what all nodes share: data, and each job's folder `jobs/ID` with its checkpoints; relative paths in manifests start here |

Remove the folder to forget everything.
";

fn section(command: &mut Command, path: &str, depth: usize, page: &mut String) {
    let help = command.clone().term_width(100).render_long_help().to_string();
    let help: Vec<&str> = help.lines().map(str::trim_end).collect();
    page.push_str(&format!(
        "\n{} {path}\n\n```text\n{}\n```\n",
        "#".repeat(depth),
        help.join("\n").trim_end()
    ));
    let visible = |command: &&mut Command| !command.is_hide_set();
    for inner in command.get_subcommands_mut().filter(visible) {
        let path = format!("{path} {}", inner.get_name());
        section(inner, &path, (depth + 1).min(4), page);
    }
}
