//! A sample as OpenMetrics text.

use std::collections::BTreeMap;
use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;
use uhmm_shared::record::{BUCKETS, bucket_bound_ns};

use crate::catalog::{self, Meta, Of, Type};
use crate::record::Times;
use crate::sample::{Region, Sample, Service};

/// What an HTTP answer says that it is.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// Regions that are told one by one.
const REGIONS_MAX: usize = 32;

type Labels = Vec<(String, String)>;

/// Samples of one family.
#[derive(Debug)]
enum Points {
    Counter(Vec<(Labels, u64)>),
    Gauge(Vec<(Labels, f64)>),
    Histogram(Vec<(Labels, u64, Vec<u64>)>),
}

#[derive(Debug)]
struct Family {
    help: String,
    points: Points,
}

/// By name: a family's samples must be together.
#[derive(Debug, Default)]
struct Families(BTreeMap<String, Family>);

impl Families {
    fn family(&mut self, name: String, help: &str, kind: Type) -> &mut Points {
        let empty = || match kind {
            Type::Counter => Points::Counter(Vec::new()),
            Type::Gauge => Points::Gauge(Vec::new()),
            Type::Histogram => Points::Histogram(Vec::new()),
        };
        &mut self.0.entry(name).or_insert_with(|| Family { help: help.to_owned(), points: empty() }).points
    }

    fn counter(&mut self, name: String, help: &str, labels: Labels, value: u64) {
        if let Points::Counter(points) = self.family(name, help, Type::Counter) {
            points.push((labels, value));
        }
    }

    fn gauge(&mut self, name: String, help: &str, labels: Labels, value: f64) {
        if let Points::Gauge(points) = self.family(name, help, Type::Gauge) {
            points.push((labels, value));
        }
    }

    fn known(&mut self, of: Of, name: &str, labels: Labels, value: f64) {
        let meta = catalog::ALL.iter().find(|meta| meta.of == of && meta.name == name);
        let Some(meta) = meta else { return };
        match meta.kind {
            Type::Counter => self.counter(meta.family(), meta.help, labels, value as u64),
            Type::Gauge | Type::Histogram => self.gauge(meta.family(), meta.help, labels, value),
        }
    }

    fn service(&mut self, service: &Service) {
        let labels = || vec![("service".to_owned(), service.name.clone())];
        let flag = |is: bool| f64::from(u8::from(is));
        for (name, value) in [
            ("service_up", flag(service.state == "ready")),
            ("service_held", flag(service.state == "held")),
            ("service_restarts", f64::from(service.incarnation.saturating_sub(1))),
            ("service_recovery_seconds", service.last_recovery_ms as f64 / 1e3),
            ("service_uptime_seconds", service.uptime_ms as f64 / 1e3),
            ("service_missed_heartbeats", f64::from(service.missed_heartbeats)),
            ("service_vault_entries", f64::from(service.vault_entries)),
            ("service_events", service.events_written as f64),
        ] {
            self.known(Of::Every, name, labels(), value);
        }
        let kind = kind_of(&service.name);
        let name_and_help = |name: &str| {
            let known = catalog::find(kind, name);
            let family = known.map_or_else(|| format!("uhmm_{kind}_{}", catalog::gauge_name(name)), Meta::family);
            (family, known.map_or("Of the driver's own", |meta| meta.help))
        };
        let with = |own: &Labels| labels().into_iter().chain(own.iter().cloned()).collect::<Labels>();
        for value in &service.values {
            let (family, help) = name_and_help(&value.name);
            match value.counter {
                true => self.counter(family, help, with(&value.labels), value.value),
                false if value.name.ends_with("_ms") => {
                    self.gauge(family, help, with(&value.labels), value.value as f64 / 1e3);
                }
                false => self.gauge(family, help, with(&value.labels), value.value as f64),
            }
        }
        for times in &service.times {
            let (family, help) = name_and_help(&times.name);
            if let Points::Histogram(points) = self.family(format!("{family}_seconds"), help, Type::Histogram) {
                let Times { sum_ns, buckets, .. } = times;
                points.push((with(&times.labels), *sum_ns, buckets.clone()));
            }
        }
    }

    fn memory(&mut self, sample: &Sample) {
        let mut all: BTreeMap<String, u64> = BTreeMap::new();
        for (index, region) in sample.regions.iter().enumerate() {
            for (place, bytes) in places(region, sample) {
                *all.entry(place.clone()).or_default() += bytes;
                if index < REGIONS_MAX && bytes > 0 {
                    let own = [("pid", region.pid.to_string()), ("region", region.id.to_string()), ("place", place)];
                    let labels = own.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
                    self.known(Of::Memory, "region_bytes", labels, bytes as f64);
                }
            }
        }
        for (place, bytes) in all {
            self.known(Of::Memory, "resident_bytes", vec![("place".to_owned(), place)], bytes as f64);
        }
    }
}

/// Bytes of a region by place.
fn places(region: &Region, sample: &Sample) -> Vec<(String, u64)> {
    let mut places = vec![
        ("home".to_owned(), region.system_pages * 4096),
        ("absent".to_owned(), region.absent_pages * 4096),
        ("moving".to_owned(), region.moving_pages * 4096),
        ("lost".to_owned(), region.poisoned_pages * 4096),
    ];
    for (device, pages) in sample.devices.iter().zip(&region.device_pages) {
        places.push((device.name.clone(), pages * 4096));
    }
    places
}

/// What its metrics are named after.
pub fn kind_of(service: &str) -> &str {
    if matches!(service, "supervisor" | "holder" | "pager" | "mirror") { service } else { "driver" }
}

impl Collector for Families {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        for (name, Family { help, points }) in &self.0 {
            let kind = match points {
                Points::Counter(_) => MetricType::Counter,
                Points::Gauge(_) => MetricType::Gauge,
                Points::Histogram(_) => MetricType::Histogram,
            };
            let mut metric = encoder.encode_descriptor(name, help, None, kind)?;
            match points {
                Points::Counter(points) => {
                    for (labels, value) in points {
                        metric.encode_family(labels)?.encode_counter::<NoLabelSet, u64, u64>(value, None)?;
                    }
                }
                Points::Gauge(points) => {
                    for (labels, value) in points {
                        metric.encode_family(labels)?.encode_gauge(value)?;
                    }
                }
                Points::Histogram(points) => {
                    for (labels, sum_ns, buckets) in points {
                        let bound = |bucket| bucket_bound_ns(bucket).map_or(f64::INFINITY, |ns| ns as f64 / 1e9);
                        let bounded: Vec<(f64, u64)> =
                            buckets.iter().take(BUCKETS).enumerate().map(|(n, count)| (bound(n), *count)).collect();
                        let count = buckets.iter().sum();
                        let mut point = metric.encode_family(labels)?;
                        point.encode_histogram::<NoLabelSet>(*sum_ns as f64 / 1e9, count, &bounded, None)?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// The whole exposition.
pub fn exposition(sample: &Sample) -> String {
    let mut families = Families::default();
    sample.services.iter().for_each(|service| families.service(service));
    families.memory(sample);
    families.known(Of::Own, "scrape_problems", Vec::new(), sample.problems.len() as f64);
    let mut registry = Registry::default();
    registry.register_collector(Box::new(families));
    let mut text = String::new();
    // A String takes everything.
    if text::encode(&mut text, &registry).is_err() {
        text.clear();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Value;
    use crate::sample::Device;

    fn sample() -> Sample {
        let value = |name: &str, counter, value| Value { name: name.to_owned(), labels: Vec::new(), counter, value };
        let cause = vec![("cause".to_owned(), "user".to_owned()), ("way".to_owned(), "out".to_owned())];
        let mut buckets = vec![0; BUCKETS];
        (buckets[0], buckets[4], buckets[BUCKETS - 1]) = (1, 2, 1);
        let pager = Service {
            name: "pager".to_owned(),
            state: "ready".to_owned(),
            incarnation: 3,
            values: vec![
                value("cpu_faults", true, 42),
                value("spaces", false, 1),
                Value { labels: cause, ..value("migrated_bytes", true, 8192) },
            ],
            times: vec![Times {
                name: "fault".to_owned(),
                labels: vec![("kind".to_owned(), "device".to_owned())],
                sum_ns: 1_500_000_000,
                buckets,
            }],
            ..Service::default()
        };
        let driver = Service {
            name: "so\"ft0".to_owned(),
            values: vec![value("jobs", true, 7), value("own_thing", true, 1), value("warm_ms", false, 250)],
            ..Service::default()
        };
        let region = Region { pid: 9, id: 5, pages: 3, system_pages: 1, device_pages: vec![2, 0], ..Region::default() };
        let devices = vec![Device { name: "soft0".to_owned(), ..Device::default() }];
        Sample { services: vec![pager, driver], devices, regions: vec![region], ..Sample::default() }
    }

    #[test]
    fn the_exposition_says_what_the_sample_has() {
        let text = exposition(&sample());
        for line in [
            "# TYPE uhmm_pager_cpu_faults counter",
            "uhmm_pager_cpu_faults_total{service=\"pager\"} 42",
            "uhmm_service_restarts_total{service=\"pager\"} 2",
            "uhmm_service_up{service=\"pager\"} 1.0",
            "uhmm_pager_migrated_bytes_total{service=\"pager\",cause=\"user\",way=\"out\"} 8192",
            "uhmm_pager_fault_seconds_sum{service=\"pager\",kind=\"device\"} 1.5",
            "uhmm_pager_fault_seconds_count{service=\"pager\",kind=\"device\"} 4",
            "uhmm_pager_fault_seconds_bucket{le=\"2.56e-7\",service=\"pager\",kind=\"device\"} 1",
            "uhmm_driver_jobs_total{service=\"so\\\"ft0\"} 7",
            "uhmm_driver_own_thing_total{service=\"so\\\"ft0\"} 1",
            "uhmm_driver_warm_seconds{service=\"so\\\"ft0\"} 0.25",
            "uhmm_resident_bytes{place=\"soft0\"} 8192.0",
            "uhmm_region_bytes{pid=\"9\",region=\"5\",place=\"home\"} 4096.0",
            "# EOF",
        ] {
            assert!(text.lines().any(|is| is == line), "{line} is missing in:\n{text}");
        }
    }

    #[test]
    fn buckets_are_cumulative_and_end_in_infinity() {
        let text = exposition(&sample());
        let buckets: Vec<u64> = text
            .lines()
            .filter(|line| line.starts_with("uhmm_pager_fault_seconds_bucket"))
            .filter_map(|line| line.rsplit(' ').next()?.parse().ok())
            .collect();
        assert!(buckets.is_sorted() && buckets.last() == Some(&4), "{buckets:?}");
        assert_eq!(text.lines().filter(|line| line.contains("le=\"+Inf\"")).count(), 1);
    }

    #[test]
    fn a_family_is_in_one_piece() {
        let text = exposition(&sample());
        let types: Vec<&str> = text.lines().filter(|line| line.starts_with("# TYPE")).collect();
        let unique: std::collections::BTreeSet<&&str> = types.iter().collect();
        assert_eq!(types.len(), unique.len());
    }

    #[test]
    fn many_regions_are_told_in_sum() {
        let region = sample().regions[0].clone();
        let many = Sample { regions: (0..1000).map(|id| Region { id, ..region.clone() }).collect(), ..sample() };
        let text = exposition(&many);
        assert_eq!(text.lines().filter(|line| line.starts_with("uhmm_region_bytes{")).count(), 2 * REGIONS_MAX);
        assert!(text.contains("uhmm_resident_bytes{place=\"home\"} 4096000.0"));
    }
}
