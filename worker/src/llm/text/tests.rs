//! Text that arrives in any pieces.

#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;

fn text(stops: &[&str]) -> Text {
    Text::new(stops.iter().map(|&stop| stop.to_owned()).collect())
}

/// All that is told of these pieces, and whether a stop sequence ended it.
fn told(mut text: Text, pieces: &[&[u8]]) -> (String, bool) {
    let mut told = String::new();
    for piece in pieces {
        match text.push(piece) {
            Piece::More(more) => told += &more,
            Piece::Last(last) => return (told + &last, true),
        }
    }
    (told + &text.finish(), false)
}

#[test]
fn half_a_character_waits_for_the_other() {
    let mut text = text(&[]);
    assert_eq!(text.push(b"a\xe2\x82"), Piece::More("a".to_owned()));
    assert_eq!(text.push(b"\xac!"), Piece::More("\u{20ac}!".to_owned()));
    assert_eq!(text.push(b"\xf0\x9f"), Piece::More(String::new()));
    assert_eq!(text.finish(), "\u{fffd}");
}

#[test]
fn what_may_become_a_stop_sequence_is_held_back() {
    let mut text = text(&["END", "\n\n"]);
    assert_eq!(text.push(b"the E"), Piece::More("the ".to_owned()));
    assert_eq!(text.push(b"N"), Piece::More(String::new()));
    assert_eq!(text.push(b"EN"), Piece::More("EN".to_owned()));
    assert_eq!(text.push(b"D of it"), Piece::Last(String::new()));
}

#[test]
fn the_first_stop_sequence_to_be_complete_ends_the_answer() {
    assert_eq!(
        told(text(&["abc", "b"]), &[b"xabc"]),
        ("xa".to_owned(), true)
    );
    assert_eq!(
        told(text(&["abc", "c"]), &[b"xabc"]),
        ("x".to_owned(), true)
    );
    assert_eq!(told(text(&["abc"]), &[b"xab"]), ("xab".to_owned(), false));
    assert_eq!(
        told(text(&["\u{20ac}"]), &[b"5\xe2", b"\x82\xac"]),
        ("5".to_owned(), true)
    );
}

/// The plain way, for text that is there as a whole.
fn plainly(text: &str, stops: &[String]) -> (String, bool) {
    for end in (0..=text.len()).filter(|&end| text.is_char_boundary(end)) {
        let ended = stops.iter().filter(|stop| text[..end].ends_with(*stop));
        if let Some(longest) = ended.map(String::len).max() {
            return (text[..end - longest].to_owned(), true);
        }
    }
    (text.to_owned(), false)
}

proptest! {
    #[test]
    fn pieces_do_not_matter(
        whole in "[ab€]{0,12}",
        stops in prop::collection::vec("[ab€]{1,3}", 0..3),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
    ) {
        let bytes = whole.as_bytes();
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
        cuts.extend([0, bytes.len()]);
        cuts.sort_unstable();
        let pieces: Vec<&[u8]> = cuts.windows(2).map(|cut| &bytes[cut[0]..cut[1]]).collect();
        prop_assert_eq!(told(Text::new(stops.clone()), &pieces), plainly(&whole, &stops));
    }

    #[test]
    fn any_bytes_are_some_text(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..5), 0..8)) {
        let bytes = pieces.concat();
        let pieces: Vec<&[u8]> = pieces.iter().map(Vec::as_slice).collect();
        let (told, is_stopped) = told(text(&[]), &pieces);
        prop_assert!(!is_stopped);
        prop_assert_eq!(told, String::from_utf8_lossy(&bytes));
    }
}
