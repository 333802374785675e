//! The picture of a [`Top`]: nothing is decided here.

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line as Text, Span};
use ratatui::widgets::{Block, Borders, Paragraph, Sparkline};
use uhmm_ipc::message::pager::StripCell;

use super::state::{Pane, Top};
use crate::events::{bytes, duration};
use crate::sample::{Device, Region, Service};

/// From here on there is room for events beside the rest.
const WIDE: u16 = 120;

/// Draws everything.
pub fn draw(top: &Top, frame: &mut Frame<'_>) {
    let [head, body, foot] =
        Layout::vertical([Constraint::Length(1), Constraint::Min(1), Constraint::Length(1)]).areas(frame.area());
    frame.render_widget(Paragraph::new(title(top, head.width)), head);
    let (left, right) = if body.width >= WIDE {
        let [left, right] = Layout::horizontal([Constraint::Percentage(55), Constraint::Percentage(45)]).areas(body);
        (left, Some(right))
    } else {
        (body, None)
    };
    let services = top.now.services.len().max(1) as u16 + 2;
    let devices = top.now.devices.len().clamp(1, 8) as u16 + 1;
    let log = if right.is_some() { 0 } else { (left.height / 5).clamp(3, 10) };
    let [services, devices, rates, regions, log] = Layout::vertical([
        Constraint::Length(services.min(left.height * 3 / 8)),
        Constraint::Length(devices),
        Constraint::Length(4),
        Constraint::Min(3),
        Constraint::Length(log),
    ])
    .areas(left);
    draw_services(top, frame, services);
    draw_devices(top, frame, devices);
    draw_rates(top, frame, rates);
    draw_regions(top, frame, regions);
    draw_log(top, frame, right.unwrap_or(log));
    frame.render_widget(Paragraph::new(foot_line(top)), foot);
}

fn bold() -> Style {
    Style::new().add_modifier(Modifier::BOLD)
}

fn dim() -> Style {
    Style::new().fg(Color::DarkGray)
}

/// Each device has its colour everywhere.
fn device_color(id: usize) -> Color {
    [
        Color::Cyan,
        Color::Magenta,
        Color::Yellow,
        Color::Green,
        Color::Blue,
        Color::LightRed,
        Color::LightCyan,
        Color::White,
    ][id % 8]
}

fn title(top: &Top, width: u16) -> Text<'static> {
    let up = top.now.service("supervisor").map_or(0, |supervisor| supervisor.uptime_ms / 1000);
    let (ready, all) = (top.now.services.len() - top.now.not_ready().len(), top.now.services.len());
    let state = if ready == all { Style::new().fg(Color::Green) } else { Style::new().fg(Color::Red) };
    let mut spans = vec![
        Span::styled("uhmm", bold()),
        Span::raw(format!("  up {up} s  ")),
        Span::styled(format!("{ready}/{all} ready"), state),
    ];
    if top.replayed {
        spans.push(Span::styled("  replay", Style::new().fg(Color::Yellow)));
    }
    if let Some(problem) = top.now.problems.first() {
        let room = usize::from(width).saturating_sub(40);
        spans.push(Span::styled(format!("  {}", cut(problem, room)), Style::new().fg(Color::Red)));
    }
    Text::from(spans)
}

fn pane_block(top: &Top, pane: Pane, name: String) -> Block<'static> {
    let style = if top.pane == pane { bold().fg(Color::Cyan) } else { dim() };
    Block::new().borders(Borders::TOP).border_style(dim()).title(Span::styled(name, style))
}

/// The lines around the selected one that fit.
fn window(selected: usize, len: usize, rows: usize) -> std::ops::Range<usize> {
    let first = (selected + 1).saturating_sub(rows).min(len.saturating_sub(rows));
    first..(first + rows).min(len)
}

fn marked(top: &Top, pane: Pane, index: usize, line: Text<'static>) -> Text<'static> {
    let here = top.pane == pane && top.selected(pane) == index;
    if here { line.style(Style::new().add_modifier(Modifier::REVERSED)) } else { line }
}

fn draw_services(top: &Top, frame: &mut Frame<'_>, area: Rect) {
    let wide = area.width >= 76;
    let head = format!(
        "{:<12} {:<9} {:>7} {:>4} {:>8} {:>6} {:>9}  {}",
        "SERVICE",
        "STATE",
        "PID",
        "INC",
        "UPTIME",
        "MISSED",
        "RECOVERY",
        if wide { "SANDBOX" } else { "" }
    );
    let services = &top.now.services;
    let rows = usize::from(area.height).saturating_sub(2);
    let line = |index: usize| marked(top, Pane::Services, index, service_line(&services[index]));
    let range = window(top.selected(Pane::Services), services.len(), rows);
    let lines: Vec<Text<'_>> = std::iter::once(Text::styled(head, dim())).chain(range.map(line)).collect();
    frame.render_widget(Paragraph::new(lines).block(pane_block(top, Pane::Services, " services ".to_owned())), area);
}

fn service_line(service: &Service) -> Text<'static> {
    let color = match service.state.as_str() {
        "ready" => Color::Green,
        "held" => Color::Red,
        _ => Color::Yellow,
    };
    let pid = if service.pid == 0 { "-".to_owned() } else { service.pid.to_string() };
    let recovery =
        if service.last_recovery_ms == 0 { "-".to_owned() } else { format!("{} ms", service.last_recovery_ms) };
    let sandbox = if service.sandbox.is_empty() { "none".to_owned() } else { service.sandbox.join(" ") };
    Text::from(vec![
        Span::raw(format!("{:<12} ", cut(&service.name, 12))),
        Span::styled(format!("{:<9}", cut(&service.state, 9)), Style::new().fg(color)),
        Span::raw(format!(
            " {pid:>7} {:>4} {:>8} {:>6} {recovery:>9}  ",
            service.incarnation,
            time(service.uptime_ms / 1000),
            service.missed_heartbeats
        )),
        Span::styled(sandbox, dim()),
    ])
}

/// As short as it can be.
fn time(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

fn draw_devices(top: &Top, frame: &mut Frame<'_>, area: Rect) {
    let devices = &top.now.devices;
    let rows = usize::from(area.height).saturating_sub(1);
    let cells = usize::from(area.width).saturating_sub(44).clamp(8, 60);
    let line = |index: usize| marked(top, Pane::Devices, index, device_line(index, &devices[index], cells));
    let lines: Vec<Text<'_>> = window(top.selected(Pane::Devices), devices.len(), rows).map(line).collect();
    frame.render_widget(Paragraph::new(lines).block(pane_block(top, Pane::Devices, " devices ".to_owned())), area);
}

fn device_line(id: usize, device: &Device, cells: usize) -> Text<'static> {
    let used = device.memory_bytes.saturating_sub(device.free_bytes);
    let full = match device.memory_bytes {
        0 => 0,
        // One cell at least as long as anything is there.
        all => ((u128::from(used) * cells as u128).div_ceil(u128::from(all))) as usize,
    };
    let percent = used.saturating_mul(100).checked_div(device.memory_bytes).unwrap_or(0);
    let amount = match device.memory_bytes {
        0 => "not logged in".to_owned(),
        all => format!("{} of {}  {percent} %", bytes(used), bytes(all)),
    };
    Text::from(vec![
        Span::raw(format!("{id} {:<10} ", cut(&device.name, 10))),
        Span::styled("█".repeat(full), Style::new().fg(device_color(id))),
        Span::styled("░".repeat(cells.saturating_sub(full)), dim()),
        Span::raw(format!("  {amount}")),
    ])
}

fn draw_rates(top: &Top, frame: &mut Frame<'_>, area: Rect) {
    let rates = &top.rates;
    let rate = |value: f64| bytes(value.round() as u64);
    let moved = Text::from(format!(
        "out {}/s  home {}/s (evicted {}/s)  peer {}/s",
        rate(rates.out_bytes),
        rate(rates.home_bytes),
        rate(rates.evicted_bytes),
        rate(rates.peer_bytes)
    ));
    let faults =
        Text::from(format!("faults: {:.0}/s of programs, {:.0}/s of devices", rates.cpu_faults, rates.device_faults));
    let latency = match rates.fault_p99_ns {
        0 => "on devices: none".to_owned(),
        p99 => format!("on devices: 50 % < {}, 99 % < {}", duration(rates.fault_p50_ns), duration(p99)),
    };
    let block = Block::new().borders(Borders::TOP).border_style(dim()).title(Span::styled(" rates ", dim()));
    let inner = block.inner(area);
    frame.render_widget(block, area);
    let [text, spark] = Layout::vertical([Constraint::Length(2), Constraint::Length(1)]).areas(inner);
    frame.render_widget(Paragraph::new(vec![moved, faults]), text);
    let [name, bars] = Layout::horizontal([Constraint::Length(42), Constraint::Min(1)]).areas(spark);
    frame.render_widget(Paragraph::new(Span::raw(latency)), name);
    // Orders of magnitude: what matters is at both ends. Without a fault there is no bar.
    let height = |ns: &u64| if *ns == 0 { 0 } else { u64::from(ns.ilog2()).saturating_sub(7) };
    let shown = top.history.len().saturating_sub(usize::from(bars.width));
    let data: Vec<u64> = top.history.iter().skip(shown).map(height).collect();
    frame.render_widget(Sparkline::default().data(data).max(24).style(Style::new().fg(Color::Yellow)), bars);
}

fn draw_regions(top: &Top, frame: &mut Frame<'_>, area: Rect) {
    let regions = &top.now.regions;
    let rows = usize::from(area.height).saturating_sub(1);
    let cells = usize::from(area.width).saturating_sub(36).max(8);
    let line = |index: usize| marked(top, Pane::Regions, index, region_line(&regions[index], cells));
    let mut lines: Vec<Text<'_>> = window(top.selected(Pane::Regions), regions.len(), rows).map(line).collect();
    if lines.is_empty() {
        lines.push(Text::styled("No process has memory under management", dim()));
    }
    let name = format!(" regions ({}): h home, . untouched, 0-7 device, > moving, ! lost ", regions.len());
    frame.render_widget(Paragraph::new(lines).block(pane_block(top, Pane::Regions, name)), area);
}

fn region_line(region: &Region, cells: usize) -> Text<'static> {
    let mut spans = vec![Span::raw(format!(
        "{:>7} {:#014x} {:>10} ",
        region.pid,
        region.addr,
        cut(&bytes(region.pages.saturating_mul(4096)), 10)
    ))];
    let mut last: Option<(StripCell, usize)> = None;
    let shown = stretched(&region.strip, cells);
    for cell in shown.into_iter().map(StripCell::from_byte).map(Some).chain([None]) {
        match (&mut last, cell) {
            (Some((same, count)), Some(cell)) if *same == cell => *count += 1,
            (run, next) => {
                if let Some((cell, count)) = run.take() {
                    spans.push(strip_span(cell, count));
                }
                last = next.map(|cell| (cell, 1));
            }
        }
    }
    Text::from(spans)
}

/// So many cells, whatever there are.
fn stretched(strip: &[u8], cells: usize) -> Vec<u8> {
    if strip.is_empty() {
        return Vec::new();
    }
    (0..cells).map(|cell| strip[cell * strip.len() / cells]).collect()
}

/// Colours for who sees them, letters for everybody.
fn strip_span(cell: StripCell, count: usize) -> Span<'static> {
    let (letter, style) = match cell {
        StripCell::Absent => ('.', dim()),
        StripCell::System => ('h', Style::new().fg(Color::Black).bg(Color::Gray)),
        StripCell::Moving => ('>', Style::new().fg(Color::Black).bg(Color::Yellow)),
        StripCell::Poisoned => ('!', Style::new().fg(Color::White).bg(Color::Red)),
        StripCell::Device(id) => {
            let digit = char::from_digit(u32::from(id), 16).unwrap_or('?');
            (digit, Style::new().fg(Color::Black).bg(device_color(usize::from(id))))
        }
    };
    Span::styled(letter.to_string().repeat(count), style)
}

fn draw_log(top: &Top, frame: &mut Frame<'_>, area: Rect) {
    let rows = usize::from(area.height).saturating_sub(1);
    let shown = top.log.len().saturating_sub(rows);
    let lines: Vec<Text<'_>> = top
        .log
        .iter()
        .skip(shown)
        .map(|line| {
            let color = match line.what.as_str() {
                "service-died" | "service-held" | "pages-lost" | "quota-refused" => Color::Red,
                "thrash" | "service-condemned" => Color::Yellow,
                _ => Color::Reset,
            };
            Text::styled(line.to_string().trim_start().to_owned(), Style::new().fg(color))
        })
        .collect();
    let block = Block::new().borders(Borders::TOP).border_style(dim()).title(Span::styled(" events ", dim()));
    frame.render_widget(Paragraph::new(lines).block(block), area);
}

fn foot_line(top: &Top) -> Text<'static> {
    if let Some(action) = &top.confirm {
        let text = format!("{}? y: yes, any other key: no", top.words(action));
        return Text::styled(text, bold().fg(Color::Black).bg(Color::Yellow));
    }
    if top.choosing_device {
        return Text::styled("To which device? Its number", bold().fg(Color::Black).bg(Color::Yellow));
    }
    if !top.message.is_empty() {
        return Text::styled(top.message.clone(), Style::new().fg(Color::Yellow));
    }
    Text::styled("tab pane  up/down select  r restart  d drain  e evict  m migrate  q quit", dim())
}

fn cut(text: &str, chars: usize) -> String {
    text.chars().take(chars).collect()
}
