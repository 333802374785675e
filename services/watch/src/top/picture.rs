//! What is on the screen, as text and as SVG: for `--once`, for tests and for the documentation.

use std::fmt::Write;

use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::buffer::Buffer;
use ratatui::style::{Color, Modifier};

use super::state::Top;
use super::view::draw;

/// Of a terminal of that size.
pub fn render(top: &Top, width: u16, height: u16) -> Buffer {
    // This backend cannot fail.
    let Ok(mut terminal) = Terminal::new(TestBackend::new(width, height));
    let Ok(_) = terminal.draw(|frame| draw(top, frame));
    terminal.backend().buffer().clone()
}

/// Lines without what is behind them.
pub fn text(buffer: &Buffer) -> String {
    let mut text = String::new();
    for y in 0..buffer.area.height {
        let line: String = (0..buffer.area.width).map(|x| buffer[(x, y)].symbol()).collect();
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

const CELL: (u32, u32) = (8, 17);

/// As a terminal with a dark background has it.
pub fn svg(buffer: &Buffer) -> String {
    let (width, height) = (u32::from(buffer.area.width) * CELL.0, u32::from(buffer.area.height) * CELL.1);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" font-family=\"monospace\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#101418\"/>\n"
    );
    for y in 0..buffer.area.height {
        let mut x = 0;
        while x < buffer.area.width {
            let cell = &buffer[(x, y)];
            let colors = colors(cell.fg, cell.bg, cell.modifier);
            let same = |x: &u16| {
                let other = &buffer[(*x, y)];
                self::colors(other.fg, other.bg, other.modifier) == colors && other.modifier == cell.modifier
            };
            let end = (x..buffer.area.width).find(|x| !same(x)).unwrap_or(buffer.area.width);
            let run: String = (x..end).map(|x| buffer[(x, y)].symbol()).collect();
            let (left, top) = (u32::from(x) * CELL.0, u32::from(y) * CELL.1);
            // A String takes everything.
            if let Some(back) = colors.1 {
                let wide = u32::from(end - x) * CELL.0;
                let high = CELL.1;
                let _ = writeln!(
                    svg,
                    "<rect x=\"{left}\" y=\"{top}\" width=\"{wide}\" height=\"{high}\" fill=\"{back}\"/>"
                );
            }
            if !run.trim().is_empty() {
                let weight = if cell.modifier.contains(Modifier::BOLD) { " font-weight=\"bold\"" } else { "" };
                let (base, long, fore) = (top + 13, u32::from(end - x) * CELL.0, colors.0);
                let run = run.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
                let _ = writeln!(
                    svg,
                    "<text x=\"{left}\" y=\"{base}\" fill=\"{fore}\" textLength=\"{long}\" lengthAdjust=\"spacingAndGlyphs\" xml:space=\"preserve\"{weight}>{run}</text>"
                );
            }
            x = end;
        }
    }
    svg.push_str("</svg>\n");
    svg
}

/// Of the letters, and of the background if it is not the usual one.
fn colors(fore: Color, back: Color, modifier: Modifier) -> (&'static str, Option<&'static str>) {
    let (fore, back) = (name(fore), name(back));
    if modifier.contains(Modifier::REVERSED) {
        return (back.unwrap_or("#101418"), Some(fore.unwrap_or("#d8dee4")));
    }
    (fore.unwrap_or("#d8dee4"), back)
}

fn name(color: Color) -> Option<&'static str> {
    Some(match color {
        Color::Black => "#000000",
        Color::Red | Color::LightRed => "#e5534b",
        Color::Green => "#57ab5a",
        Color::Yellow => "#c69026",
        Color::Blue => "#539bf5",
        Color::Magenta => "#b083f0",
        Color::Cyan | Color::LightCyan => "#39c5cf",
        Color::Gray => "#909dab",
        Color::DarkGray => "#768390",
        Color::White => "#ffffff",
        _ => return None,
    })
}
