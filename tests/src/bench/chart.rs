//! The overlays' figures as bars, for a page: a column for each wire, a row for each measure.
//!
//! Paths without an overlay are left out: beside the bare wire the others' bars would be too short to compare.
use anyhow::{anyhow, ensure};
use plotters::{
    coord::Shift,
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};

use super::{
    measures::Figures,
    report::{Report, Row, Summary},
    wires::Wire,
};

/// An SVG drawing.
pub fn draw(report: &Report) -> anyhow::Result<String> {
    let overlays = |wire| report.of(wire).filter(|row| row.path.encapsulates()).collect::<Vec<_>>();
    let columns: Vec<_> = Wire::ALL
        .map(|wire| (wire, overlays(wire)))
        .into_iter()
        .filter(|(_, rows)| !rows.is_empty())
        .collect();
    ensure!(!columns.is_empty(), "no overlay was measured");
    let most = columns.iter().map(|(_, rows)| rows.len()).max().unwrap_or(0) as i32;
    let panel = (WIDTH, TITLE + most * LINE + GAP);
    let size = (panel.0 * columns.len() as i32, panel.1 * PANELS.len() as i32);
    let mut drawing = String::new();
    {
        let root = SVGBackend::with_string(&mut drawing, (size.0 as u32, size.1 as u32)).into_drawing_area();
        root.fill(&WHITE).map_err(failed)?;
        let areas = root.split_evenly((PANELS.len(), columns.len()));
        let panels = PANELS.iter().flat_map(|panel| columns.iter().map(move |column| (panel, column)));
        for (area, (panel, (wire, rows))) in areas.iter().zip(panels) {
            bars(area, &format!("{}, wire {wire}", panel.title), rows, panel.of)?;
        }
        root.present().map_err(failed)?;
    }
    Ok(drawing)
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

fn bars(
    area: &Area<'_>,
    title: &str,
    rows: &[&Row],
    of: fn(&Figures<Summary>) -> Summary,
) -> anyhow::Result<()> {
    let text = |size: i32| ("sans-serif", size).into_font().color(&INK);
    let middle = |horizontal| Pos::new(horizontal, VPos::Center);
    area.draw(&Text::new(title.to_owned(), (MARGIN, GAP / 2), text(18))).map_err(failed)?;
    let greatest = rows.iter().map(|row| of(&row.figures).max).fold(f64::MIN_POSITIVE, f64::max);
    let x = |value: f64| LABELS + (value / greatest * f64::from(BARS)) as i32;
    for (at, row) in rows.iter().enumerate() {
        let (figure, top) = (of(&row.figures), TITLE + at as i32 * LINE);
        let centre = top + BAR / 2;
        let fill = if row.path.is_weft() { OURS } else { THEIRS };
        let label = Text::new(row.path.name(), (LABELS - 8, centre), text(15).pos(middle(HPos::Right)));
        let bar = Rectangle::new([(LABELS, top), (x(figure.median), top + BAR)], fill.filled());
        let range = PathElement::new([(x(figure.min), centre), (x(figure.max), centre)], INK);
        let value = Text::new(
            format!("{:.*}", digits(figure.median), figure.median),
            (x(figure.max) + 8, centre),
            text(15).pos(middle(HPos::Left)),
        );
        area.draw(&label).and_then(|()| area.draw(&bar)).map_err(failed)?;
        area.draw(&range).and_then(|()| area.draw(&value)).map_err(failed)?;
    }
    Ok(())
}

fn digits(value: f64) -> usize {
    if value < 100.0 { 1 } else { 0 }
}

/// The backend's error has no life of its own.
fn failed(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("{error}")
}

struct Panel {
    title: &'static str,
    of: fn(&Figures<Summary>) -> Summary,
}

const PANELS: &[Panel] = &[
    Panel { title: "1 TCP stream, Gb/s", of: |figures| figures.tcp1_gbps },
    Panel { title: "4 TCP streams, Gb/s", of: |figures| figures.tcp4_gbps },
    Panel { title: "64-byte UDP received under flood, kpps", of: |figures| figures.flood_kpps },
    Panel { title: "Round trip, median, µs (less is better)", of: |figures| figures.rr_p50_us },
];

const INK: RGBColor = RGBColor(40, 44, 52);
const OURS: RGBColor = RGBColor(0, 122, 135);
const THEIRS: RGBColor = RGBColor(190, 197, 204);
// All in pixels.
const WIDTH: i32 = LABELS + BARS + 70;
const LABELS: i32 = 110;
const BARS: i32 = 260;
const TITLE: i32 = 34;
const LINE: i32 = 22;
const BAR: i32 = 14;
const GAP: i32 = 16;
const MARGIN: i32 = 12;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::paths::Path;

    #[test]
    fn every_path_has_its_bar_on_every_wire_that_was_measured() {
        let sample = Figures { tcp1_gbps: 9.25, tcp4_gbps: 10.0, flood_kpps: 321.0, ..Figures::default() };
        let samples = [
            ((Wire::Plain, Path::WeftClear), vec![sample]),
            ((Wire::Plain, Path::WireguardGo), vec![sample]),
        ];
        let drawing = draw(&Report::new(1, samples)).unwrap();
        assert!(drawing.starts_with("<svg") && drawing.trim_end().ends_with("</svg>"));
        for text in ["weft-clear", "wireguard-go", "1 TCP stream, Gb/s, wire plain", "321"] {
            assert!(drawing.contains(text), "{text}: {drawing}");
        }
        assert!(!drawing.contains("offload"));
        let bare = Report::new(1, [((Wire::Plain, Path::Routed), vec![sample])]);
        assert!(draw(&bare).is_err());
    }
}
