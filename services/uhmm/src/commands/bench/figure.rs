//! A figure: what uhmm takes, what its floor takes in the same rounds, and how far from the floor it may be.

/// How far from the floor a figure may be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Reach {
    /// Times: no more than so many times the floor.
    AtMost(f64),
    /// Rates: no less than this part of the floor.
    AtLeast(f64),
    /// Shown beside the others.
    Shown,
}

impl Reach {
    /// Whether a ratio is within it; `None`: none is asked for.
    pub fn met(self, ratio: f64) -> Option<bool> {
        match self {
            Self::AtMost(most) => Some(ratio <= most),
            Self::AtLeast(least) => Some(ratio >= least),
            Self::Shown => None,
        }
    }

    pub fn text(self) -> String {
        match self {
            Self::AtMost(most) => format!("<= {most}"),
            Self::AtLeast(least) => format!(">= {least}"),
            Self::Shown => String::new(),
        }
    }
}

/// See the module head.
pub(super) struct Figure {
    pub bench: &'static str,
    pub case: String,
    pub unit: &'static str,
    pub reach: Reach,
    /// Of each round: uhmm's and the floor's.
    pub rounds: Vec<(f64, f64)>,
}

/// Middle value.
pub(super) fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

impl Figure {
    pub fn value(&self) -> f64 {
        median(self.rounds.iter().map(|(value, _)| *value))
    }

    pub fn floor(&self) -> f64 {
        median(self.rounds.iter().map(|(_, floor)| *floor))
    }

    /// The middle of the rounds' own ratios: both sides of a round have met the same machine.
    pub fn ratio(&self) -> f64 {
        median(self.rounds.iter().map(|(value, floor)| value / floor))
    }

    /// How far apart the ratios of the rounds are, as a part of the middle one.
    pub fn spread(&self) -> f64 {
        let ratios = self.rounds.iter().map(|(value, floor)| value / floor);
        let (low, high) = ratios.fold((f64::MAX, f64::MIN), |(low, high), ratio| (low.min(ratio), high.max(ratio)));
        (high - low) / self.ratio()
    }

    pub fn met(&self) -> Option<bool> {
        self.reach.met(self.ratio())
    }

    /// How many times better or worse than its reach; above 1 is better.
    pub fn margin(&self) -> Option<f64> {
        match self.reach {
            Reach::AtMost(most) => Some(most / self.ratio()),
            Reach::AtLeast(least) => Some(self.ratio() / least),
            Reach::Shown => None,
        }
    }

    pub fn verdict(&self) -> &'static str {
        match self.met() {
            Some(true) => "met",
            Some(false) => "MISSED",
            None => "",
        }
    }

    /// Both sides of every round gave a number.
    pub fn is_sound(&self) -> bool {
        let sound = |value: f64| value.is_finite() && value > 0.0;
        !self.rounds.is_empty() && self.rounds.iter().all(|(value, floor)| sound(*value) && sound(*floor))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(reach: Reach, rounds: Vec<(f64, f64)>) -> Figure {
        Figure { bench: "scale", case: "a case".to_owned(), unit: "us", reach, rounds }
    }

    #[test]
    fn a_figure_compares_the_two_sides_of_each_round() {
        // The second round met a machine of half the speed.
        let figure = figure(Reach::AtMost(0.5), vec![(10.0, 20.0), (5.0, 10.0), (12.0, 20.0)]);
        assert_eq!((figure.value(), figure.floor(), figure.ratio()), (10.0, 20.0, 0.5));
        assert!((figure.spread() - 0.2).abs() < 1e-9);
        assert_eq!((figure.verdict(), figure.margin()), ("met", Some(1.0)));
    }

    #[test]
    fn times_must_be_short_and_rates_high() {
        let rounds = vec![(3.0, 2.0)];
        assert_eq!(figure(Reach::AtMost(1.4), rounds.clone()).verdict(), "MISSED");
        assert_eq!(figure(Reach::AtLeast(1.4), rounds.clone()).verdict(), "met");
        assert_eq!(figure(Reach::Shown, rounds).verdict(), "");
    }

    #[test]
    fn what_is_no_number_is_not_sound() {
        assert!(figure(Reach::Shown, vec![(1.0, 2.0)]).is_sound());
        for broken in [vec![], vec![(0.0, 1.0)], vec![(1.0, f64::NAN)], vec![(f64::INFINITY, 1.0)]] {
            assert!(!figure(Reach::Shown, broken.clone()).is_sound(), "{broken:?}");
        }
    }
}
