#![allow(clippy::unwrap_used)]

use serde_json::{Value, json};

use super::*;
use crate::flow_logs::fixtures::{NOW, at, end, start};

fn payload(record: &Record) -> Value {
    let file = encode(record).unwrap();
    serde_json::from_str(decode(&file, Key::of(record).kind).unwrap()).unwrap()
}

#[test]
fn the_report_of_an_end_has_exactly_the_documented_members() {
    assert_eq!(
        payload(&end(7)),
        json!({
            "protocol": "tcp",
            "inner_src_ip": "100.64.0.9", "inner_src_port": 7,
            "inner_dst_ip": "10.1.2.3", "inner_dst_port": 443,
            "domain": "wiki.example.com",
            "outers": [{
                "src_ip": "192.0.2.1", "src_port": 51820,
                "dst_ip": "198.51.100.7", "dst_port": 3478,
                "path_activated_at": "2026-09-21T14:13:20.000000Z",
            }],
            "flow_start": "2026-09-21T14:13:27.000000Z",
            "flow_end": "2026-09-21T14:13:37.000000Z",
            "last_packet": "2026-09-21T14:13:35.000000Z",
            "rx_packets": 3, "tx_packets": 2, "rx_bytes": 300, "tx_bytes": 200,
        })
    );
}

#[test]
fn the_report_of_a_start_has_no_members_of_an_end() {
    let mut record = start(7);
    record.protocol = Protocol::Udp;
    record.domain = None;
    record.inner_dst = "[2001:db8::1]:53".parse().unwrap();
    record.outers[0].src = None;
    record.outers[0].dst = "[::ffff:198.51.100.7]:3478".parse().unwrap();
    assert_eq!(
        payload(&record),
        json!({
            "protocol": "udp",
            "inner_src_ip": "100.64.0.9", "inner_src_port": 7,
            "inner_dst_ip": "2001:db8::1", "inner_dst_port": 53,
            "domain": null,
            "outers": [{
                "dst_ip": "198.51.100.7", "dst_port": 3478,
                "path_activated_at": "2026-09-21T14:13:20.000000Z",
            }],
            "flow_start": "2026-09-21T14:13:27.000000Z",
        })
    );
}

#[test]
fn times_keep_their_microseconds_and_a_broken_clock_does_no_harm() {
    let text = |time: SystemTime| Timestamp::from(time).0;
    let time = at(NOW) + Duration::from_nanos(123_456_789);
    assert_eq!(text(time), "2026-09-21T14:13:20.123456Z");
    let before = SystemTime::UNIX_EPOCH - Duration::from_secs(1);
    assert_eq!(text(before), "1970-01-01T00:00:00.000000Z");
    let after = at(LAST_SECOND) + Duration::from_secs(1);
    assert_eq!(text(after), "9999-12-31T23:59:59.000000Z");
    for time in [before, after] {
        let mut record = end(1);
        record.flow_start = time;
        let key = Key::of(&record);
        assert_eq!(Key::from_file_name(&key.file_name()), Some(key));
        encode(&record).unwrap();
    }
}

#[test]
fn both_reports_of_a_flow_share_a_name_and_other_flows_have_others() {
    let (first, last) = (Key::of(&start(7)), Key::of(&end(7)));
    assert_eq!(first, last.start());
    assert_eq!(first.end(), last);
    let name = first.file_name();
    assert!(
        name.starts_with("01790000007000000000-") && name.ends_with(".start.json"),
        "{name}"
    );
    assert_eq!(
        name.replace(".start.", ".end."),
        last.file_name(),
        "differ in kind only"
    );

    let mut other = start(7);
    other.protocol = Protocol::Udp;
    assert_ne!(Key::of(&other), first);
    let mut other = start(7);
    other.inner_dst.set_port(444);
    assert_ne!(Key::of(&other), first);
    let mut other = start(7);
    other.flow_start += Duration::from_nanos(1);
    assert_ne!(Key::of(&other), first);
}

#[test]
fn names_that_were_not_given_are_not_taken() {
    let name = Key::of(&start(7)).file_name();
    assert!(Key::from_file_name(&name).is_some());
    for foreign in [
        String::new(),
        "token".to_owned(),
        ".start.json".to_owned(),
        "-.end.json".to_owned(),
        format!("{name}.new"),
        format!("0{name}"),
        format!("+{}", &name[1..]),
        format!("../{name}"),
        name.to_uppercase(),
        name.replace(".json", ".JSON"),
        name.replace("start", "middle"),
    ] {
        assert_eq!(Key::from_file_name(&foreign), None, "{foreign}");
    }
}

#[test]
fn every_truncation_is_noticed() {
    for record in [start(7), end(7)] {
        let kind = Key::of(&record).kind;
        let file = encode(&record).unwrap();
        for length in 0..file.len() {
            assert_eq!(decode(&file[..length], kind), None, "{length}");
        }
        assert!(decode(&file, kind).is_some());
    }
}

#[test]
fn every_flipped_bit_is_noticed_or_changes_nothing() {
    let file = encode(&end(7)).unwrap();
    let original = decode(&file, Kind::End).unwrap();
    for position in 0..file.len() {
        for bit in 0..8 {
            let mut damaged = file.clone();
            damaged[position] ^= 1 << bit;
            let payload = decode(&damaged, Kind::End);
            assert!(payload.is_none_or(|p| p == original), "{position}.{bit}");
        }
    }
}

fn wrap(payload: &str) -> Vec<u8> {
    let checksum = CRC.checksum(payload.as_bytes());
    format!(r#"{{"checksum":{checksum},"payload":{payload}}}"#).into_bytes()
}

#[test]
fn a_foreign_payload_is_not_taken_even_with_a_good_checksum() {
    let file = encode(&end(7)).unwrap();
    let good = decode(&file, Kind::End).unwrap();
    assert_eq!(wrap(good), file);
    let foreign = [
        "{}".to_owned(),
        "null".to_owned(),
        "[1]".to_owned(),
        good.replace("\"rx_bytes\":300,", ""),
        good.replace("\"rx_bytes\":300", "\"rx_bytes\":-1"),
        good.replace("\"tcp\"", "\"sctp\""),
        good.replace("\"protocol\"", "\"more\":1,\"protocol\""),
        good.replace("2026-09-21T14:13:27.000000Z", "yesterday"),
        good.replace("100.64.0.9", "example.com"),
    ];
    for payload in foreign {
        assert_eq!(decode(&wrap(&payload), Kind::End), None, "{payload}");
    }
    assert_eq!(decode(&file, Kind::Start), None, "an end is not a start");
    let mut longer = file.clone();
    longer.push(b'x');
    assert_eq!(decode(&longer, Kind::End), None);
    for text in ["", "{}", "[[[[", "\u{feff}{}", "{\"checksum\":1}"] {
        assert_eq!(decode(text.as_bytes(), Kind::End), None);
    }
    assert_eq!(decode(&vec![b'['; MAX_FILE], Kind::End), None);
}

#[test]
fn a_record_beyond_the_limit_is_refused_and_any_real_one_is_far_below() {
    let mut record = end(7);
    record.domain = Some("d".repeat(253));
    record.outers = vec![
        Outer {
            src: Some(
                "[2001:db8:aaaa:bbbb:cccc:dddd:eeee:ffff]:65535"
                    .parse()
                    .unwrap()
            ),
            dst: "[2001:db8:aaaa:bbbb:cccc:dddd:eeee:ffff]:65535"
                .parse()
                .unwrap(),
            path_activated_at: at(NOW),
        };
        17
    ];
    assert!(encode(&record).unwrap().len() < MAX_FILE / 10);
    record.domain = Some("d".repeat(MAX_FILE));
    assert_eq!(encode(&record), Err(TooLong));
}
