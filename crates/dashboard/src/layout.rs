//! The frame of every page.

use maud::{DOCTYPE, Markup, html};

/// The pages that the navigation names.
const PAGES: [(&str, &str); 5] = [
    ("/", "Fleet"),
    ("/jobs", "Jobs"),
    ("/queues", "Queues"),
    ("/services", "Services"),
    ("/events", "Events"),
];

/// Frames a page's main part. `live` is the address of the page's stream of new main parts.
#[must_use]
pub fn page(title: &str, path: &str, live: Option<&str>, main: &Markup) -> Markup {
    let current = |target: &str| target == path || (target != "/" && path.starts_with(target));
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { (title) " · Drumline" }
                link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E%3Cpath d='M2 3h3v10H2zM6.5 6h3v7h-3zM11 1h3v12h-3z' fill='%230b62d6'/%3E%3C/svg%3E";
                link rel="stylesheet" href="/assets/style.css";
                script src="/assets/live.js" defer {}
            }
            body {
                a.skip href="#main" { "To the content" }
                header {
                    a.name href="/" { "Drumline" }
                    nav aria-label="Pages" {
                        @for (target, name) in PAGES {
                            a href=(target) aria-current=[current(target).then_some("page")] { (name) }
                        }
                    }
                    span #lamp role="status" { @if live.is_some() { "still" } }
                }
                main #main data-live=[live] { (main) }
            }
        }
    }
}

/// The door: asks for the key.
#[must_use]
pub fn door(wrong: bool) -> Markup {
    let main = html! {
        form.door.panel method="post" action="/login" {
            h1 { "Drumline" }
            label for="key" { "Dashboard key" }
            input #key name="key" type="password" autocomplete="current-password" required autofocus;
            @if wrong { p.bad role="alert" { "That key is not valid." } }
            button type="submit" { "Open" }
            p.nothing { "It is in the state folder's file " code { "dashboard-key" } "." }
        }
    };
    page("Key", "/login", None, &main)
}

/// A page that says what went wrong.
#[must_use]
pub fn trouble(title: &str, message: &str) -> Markup {
    html! {
        div.panel {
            h1 { (title) }
            p { (message) }
            p { a href="/" { "Back to the fleet" } }
        }
    }
}
