//! `drumline top`: the fleet and its jobs in the terminal, live; `--once` prints it as text.

mod draw;
mod model;

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Args;
use drumline_wire::v1;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use tokio::sync::{mpsc, watch};

use crate::client::{Access, Client};
use crate::failure::Failure;
use crate::output::{self, Format};
use crate::top::model::{Curves, Screen};
use crate::views;

/// Watch the fleet and its jobs.
#[derive(Debug, Args)]
pub struct TopArgs {
    /// Print what it would show now, and end.
    #[arg(long)]
    pub once: bool,
    /// Time between two looks.
    #[arg(long, default_value = "1s", value_parser = crate::args::duration)]
    pub interval: Duration,
}

/// The width of what `--once` prints.
const ONCE_WIDTH: u16 = 120;

/// Runs the command. Without a terminal, or in JSON or YAML, it looks once.
///
/// # Errors
/// Unreachable, at the start; later it keeps what it knows and says so.
pub async fn run(args: &TopArgs, access: &Access, format: Format) -> Result<(), Failure> {
    let client = access.connect().await?;
    let mut screen = Screen::default();
    screen.fleet = fleet(&client).await?;
    screen.address.clone_from(&client.address);
    if args.once || format != Format::Table || !std::io::stdout().is_terminal() {
        screen.curves = curves(&client, &screen).await.unwrap_or_default();
        return output::value(format, &views::fleet(&screen.fleet), || {
            draw::text(&screen, ONCE_WIDTH)
        });
    }
    live(args, access, screen).await
}

/// What the screen is told.
enum Input {
    Look(Box<v1::FleetView>, Curves),
    Lost(String),
    Key(KeyEvent),
    Resized,
}

async fn live(args: &TopArgs, access: &Access, mut screen: Screen) -> Result<(), Failure> {
    let (inputs_in, mut inputs) = mpsc::channel(64);
    let done = Arc::new(AtomicBool::new(false));
    let (chosen_in, chosen) = watch::channel(screen.chosen_id());
    let mut terminal = ratatui::try_init()?;
    let keys = std::thread::spawn({
        let (done, inputs) = (done.clone(), inputs_in.clone());
        move || read_keys(&done, &inputs)
    });
    let interval = args.interval.clamp(Duration::from_millis(100), Duration::from_secs(60));
    let looking = tokio::spawn(look(access.clone(), interval, chosen, inputs_in));
    let outcome = loop {
        if let Err(error) = terminal.draw(|frame| draw::screen(frame, &screen)) {
            break Err(Failure::from(error));
        }
        match inputs.recv().await {
            None => break Ok(()),
            Some(Input::Look(fleet, curves)) => {
                screen.fleet = *fleet;
                screen.curves = curves;
                screen.lost.clear();
                screen.keep_choice();
            }
            Some(Input::Lost(why)) => screen.lost = why,
            Some(Input::Resized) => {}
            Some(Input::Key(key)) => {
                let control_c =
                    key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
                match key.code {
                    KeyCode::Char('q') | KeyCode::Esc => break Ok(()),
                    _ if control_c => break Ok(()),
                    KeyCode::Down | KeyCode::Char('j') => screen.choose(1),
                    KeyCode::Up | KeyCode::Char('k') => screen.choose(-1),
                    _ => {}
                }
            }
        }
        chosen_in.send_if_modified(|chosen| {
            let now = screen.chosen_id();
            let changed = *chosen != now;
            *chosen = now;
            changed
        });
    };
    done.store(true, Ordering::Relaxed);
    looking.abort();
    ratatui::restore();
    let _ = tokio::task::spawn_blocking(move || keys.join()).await;
    outcome
}

/// Reads keys until told to stop; a key waits at most a moment.
fn read_keys(done: &AtomicBool, inputs: &mpsc::Sender<Input>) {
    while !done.load(Ordering::Relaxed) {
        match event::poll(Duration::from_millis(100)) {
            Ok(false) => continue,
            Ok(true) => {}
            Err(_) => return,
        }
        let input = match event::read() {
            Ok(Event::Key(key)) if key.kind != KeyEventKind::Release => Input::Key(key),
            Ok(Event::Resize(..)) => Input::Resized,
            Ok(_) => continue,
            Err(_) => return,
        };
        if inputs.blocking_send(input).is_err() {
            return;
        }
    }
}

/// Looks at the fleet again and again, and at once when another job is chosen.
async fn look(
    access: Access,
    interval: Duration,
    mut chosen: watch::Receiver<String>,
    inputs: mpsc::Sender<Input>,
) {
    let mut client: Option<Client> = None;
    loop {
        let looked = async {
            let present = match &client {
                Some(client) => client.clone(),
                None => client.insert(access.connect().await?).clone(),
            };
            let fleet = fleet(&present).await?;
            let id = chosen.borrow_and_update().clone();
            let curves = curves_of(&present, &id).await?;
            Ok::<_, Failure>(Input::Look(Box::new(fleet), curves))
        };
        let input = match looked.await {
            Ok(input) => input,
            Err(failure) => {
                // The control plane may come back on another port.
                client = None;
                Input::Lost(failure.cause)
            }
        };
        if inputs.send(input).await.is_err() {
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(interval) => {}
            changed = chosen.changed() => if changed.is_err() { return },
        }
    }
}

async fn fleet(client: &Client) -> Result<v1::FleetView, Failure> {
    client.call(|mut c| async move { c.fleet(v1::FleetRequest {}).await }).await
}

async fn curves(client: &Client, screen: &Screen) -> Result<Curves, Failure> {
    curves_of(client, &screen.chosen_id()).await
}

async fn curves_of(client: &Client, id: &str) -> Result<Curves, Failure> {
    if id.is_empty() {
        return Ok(Curves::default());
    }
    let names = ["loss", "tokens_per_second"].map(|name| format!("job/{id}/{name}"));
    let request = v1::SeriesRequest { names: names.to_vec(), max_points: 400 };
    let response = client.call(|mut c| async move { c.series(request).await }).await?;
    let take = |name: &str| {
        let found = response.series.iter().find(|series| series.name == name);
        found.map(|series| series.y.clone()).unwrap_or_default()
    };
    Ok(Curves { loss: take(&names[0]), tokens_per_second: take(&names[1]) })
}
