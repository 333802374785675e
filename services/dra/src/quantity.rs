//! Quantities of Kubernetes (`64Mi`, `1e9`, `0.5Gi`) as bytes, and back.

/// Bytes, if it is a whole number of them.
pub fn bytes(text: &str) -> Option<u64> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.' && c != '+').unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let number = number.strip_prefix('+').unwrap_or(number);
    let (whole, part) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && part.is_empty() || !whole.bytes().chain(part.bytes()).all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let (factor, tens) = unit(suffix)?;
    // As an integer of so many tens: exact, and nothing that Kubernetes allows overflows it.
    let digits: u128 = format!("{whole}{part}").parse().ok()?;
    let exponent = tens.checked_sub(i32::try_from(part.len()).ok()?)?;
    let ten = 10u128.checked_pow(exponent.unsigned_abs())?;
    let scaled = digits.checked_mul(factor)?;
    let bytes = match exponent {
        0.. => scaled.checked_mul(ten)?,
        _ if scaled.is_multiple_of(ten) => scaled / ten,
        _ => return None,
    };
    u64::try_from(bytes).ok()
}

/// A power of two and one of ten.
fn unit(suffix: &str) -> Option<(u128, i32)> {
    Some(match suffix {
        "" => (1, 0),
        "Ki" => (1 << 10, 0),
        "Mi" => (1 << 20, 0),
        "Gi" => (1 << 30, 0),
        "Ti" => (1 << 40, 0),
        "Pi" => (1 << 50, 0),
        "Ei" => (1 << 60, 0),
        "n" => (1, -9),
        "u" => (1, -6),
        "m" => (1, -3),
        "k" => (1, 3),
        "M" => (1, 6),
        "G" => (1, 9),
        "T" => (1, 12),
        "P" => (1, 15),
        "E" => (1, 18),
        _ => (1, suffix.strip_prefix(['e', 'E'])?.parse::<i8>().ok()?.into()),
    })
}

/// The shortest way to write it.
pub fn text(bytes: u64) -> String {
    let units = [("Ei", 60), ("Pi", 50), ("Ti", 40), ("Gi", 30), ("Mi", 20), ("Ki", 10)];
    let fits = |(_, shift): &&(&str, u32)| bytes != 0 && bytes.trailing_zeros() >= *shift;
    units.iter().find(fits).map_or_else(|| bytes.to_string(), |(unit, shift)| format!("{}{unit}", bytes >> shift))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_kubernetes_writes_is_read_exactly() {
        for (text, expected) in [
            ("64Mi", 64 << 20),
            ("0", 0),
            ("67108864", 64 << 20),
            ("1.5Gi", 3 << 29),
            (".5Ki", 512),
            ("128M", 128_000_000),
            ("1e9", 1_000_000_000),
            ("1E3", 1000),
            ("2E", 2_000_000_000_000_000_000),
            ("5000m", 5),
            ("+7k", 7000),
            ("12e-1Ki", u64::MAX),
        ] {
            assert_eq!(bytes(text), (expected != u64::MAX).then_some(expected), "{text}");
        }
    }

    #[test]
    fn what_is_no_whole_number_of_bytes_is_none() {
        for text in ["", "Mi", ".", "1.0001Ki", "500m", "-1", "1.2.3", "64MiB", "64 Mi", "16Ei", "1e40", "e3", "٣"] {
            assert_eq!(bytes(text), None, "{text}");
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        for value in [0, 1, 4096, 4097, 3 << 29, 1 << 40, 5 << 60, u64::MAX] {
            assert_eq!(bytes(&text(value)), Some(value), "{}", text(value));
        }
        assert_eq!((text(64 << 20).as_str(), text(3 << 29).as_str()), ("64Mi", "1536Mi"));
    }
}
