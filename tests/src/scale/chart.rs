//! A panel for each measure, nodes to the right, both axes logarithmic, with the law that fits.
use super::figures::{Growth, MEASURES, Measure, Report};
use anyhow::anyhow;
use plotters::{coord::Shift, prelude::*};

/// An SVG drawing.
pub fn draw(report: &Report) -> anyhow::Result<String> {
    let mut drawing = String::new();
    {
        let root = SVGBackend::with_string(&mut drawing, SIZE).into_drawing_area();
        root.fill(&WHITE).map_err(failed)?;
        let areas = root.split_evenly((2, 3));
        for (area, (measure, growth)) in areas.iter().zip(MEASURES.iter().zip(&report.growth)) {
            let points = report.networks.iter().map(|one| (one.nodes as f64, (measure.of)(one)));
            panel(area, measure, growth, &points.collect::<Vec<_>>())?;
        }
        root.present().map_err(failed)?;
    }
    Ok(drawing)
}

fn panel(
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    measure: &Measure,
    growth: &Growth,
    points: &[(f64, f64)],
) -> anyhow::Result<()> {
    let fitted: Vec<_> = points.iter().map(|(n, _)| (*n, growth.factor * n.powf(growth.exponent))).collect();
    let span = |of: fn(&(f64, f64)) -> f64| {
        let values = || points.iter().chain(&fitted).map(of);
        let (least, most) = (values().fold(f64::MAX, f64::min), values().fold(f64::MIN_POSITIVE, f64::max));
        least.max(f64::MIN_POSITIVE) / MARGIN..most * MARGIN
    };
    let mut chart = ChartBuilder::on(area)
        .caption(format!("{}: n^{:.2}", measure.name, growth.exponent), ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(28)
        .y_label_area_size(60)
        .build_cartesian_2d(span(|point| point.0).log_scale(), span(|point| point.1).log_scale())
        .map_err(failed)?;
    let mut mesh = chart.configure_mesh();
    mesh.light_line_style(TRANSPARENT).x_desc("nodes").draw().map_err(failed)?;
    chart.draw_series([PathElement::new(fitted, LAW)]).map_err(failed)?;
    chart.draw_series([PathElement::new(points.to_vec(), OURS)]).map_err(failed)?;
    chart.draw_series(points.iter().map(|point| Circle::new(*point, 3, OURS.filled()))).map_err(failed)?;
    Ok(())
}

/// The backend's error has no life of its own.
fn failed(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("{error}")
}

/// In pixels.
const SIZE: (u32, u32) = (1080, 640);
/// Beyond the points, as a factor.
const MARGIN: f64 = 1.5;
const OURS: RGBColor = RGBColor(0, 122, 135);
const LAW: RGBColor = RGBColor(190, 190, 190);
