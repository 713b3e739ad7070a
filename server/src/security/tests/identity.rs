//! Names in certificates: the good, the odd and the hostile.

use proptest::prelude::*;
use rcgen::SanType;

use super::super::identity::{
    DnsName, IdentityError, PeerCertificate, PublicKeyHash, SpiffeId, sha256, validity_of,
};
use super::*;

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

fn dns(text: &str) -> SanType {
    SanType::DnsName(text.try_into().unwrap())
}

fn identity_of(names: Vec<SanType>) -> Result<Identity, IdentityError> {
    let certificate = authority().issue_names(names, day()).unwrap();
    PeerCertificate::from_der(&certificate.der).map(|peer| peer.identity)
}

#[test]
fn one_spiffe_id_is_the_identity_whatever_is_beside_it() {
    let names = vec![
        dns("a.example"),
        uri("spiffe://lab.example/ns/x/sa/y"),
        SanType::IpAddress([127, 0, 0, 1].into()),
    ];
    assert_eq!(identity_of(names).unwrap(), spiffe("/ns/x/sa/y"));
}

#[test]
fn every_dns_name_is_a_candidate_in_one_order() {
    let read = |names: &[&str]| identity_of(names.iter().map(|name| dns(name)).collect()).unwrap();
    let identity = read(&["b.example", "A.example", "*.example", "b.example"]);
    assert_eq!(identity.to_string(), "dns:a.example,b.example");
    assert_eq!(identity, read(&["a.example", "b.example"]));
    // A URI of another kind is no claim to a SPIFFE ID.
    let identity = identity_of(vec![uri("https://a.example/"), uri("urn:x:y"), dns("a.example")]).unwrap();
    assert_eq!(identity.to_string(), "dns:a.example");
}

#[test]
fn a_broken_spiffe_id_never_falls_back_to_a_dns_name() {
    for text in [
        "spiffe://lab.example",
        "spiffe://lab.example/",
        "spiffe://lab.example/a/",
        "spiffe://lab.example//a",
        "spiffe://lab.example/a/../b",
        "spiffe://lab.example/.",
        "spiffe://lab.example/a%2fb",
        "spiffe://lab.example/a?b",
        "spiffe://lab.example/a#b",
        "spiffe://lab.example/a b",
        "spiffe://lab.example/a\nb",
        "spiffe://LAB.example/a",
        "spiffe://lab.example:443/a",
        "spiffe://user@lab.example/a",
        "spiffe:///a",
        "spiffe:lab.example/a",
        "SPIFFE://lab.example/a",
    ] {
        let refused = identity_of(vec![uri(text), dns("good.example")]).unwrap_err();
        assert!(matches!(refused, IdentityError::Spiffe { .. }), "{text:?}: {refused}");
    }
    let long = format!("spiffe://lab.example/{}", "a".repeat(2028));
    assert_eq!(long.len(), 2049);
    assert!(matches!(identity_of(vec![uri(&long)]), Err(IdentityError::Spiffe { .. })));
    assert!(identity_of(vec![uri(&long[..2048])]).is_ok());
    let domain = format!("spiffe://{}/a", "d".repeat(256));
    assert!(matches!(identity_of(vec![uri(&domain)]), Err(IdentityError::Spiffe { .. })));
}

#[test]
fn two_identities_are_none() {
    for other in ["spiffe://lab.example/b", "https://b.example/", "spiffe://lab.example/a"] {
        for names in
            [[uri("spiffe://lab.example/a"), uri(other)], [uri(other), uri("spiffe://lab.example/a")]]
        {
            assert_eq!(identity_of(names.to_vec()).unwrap_err(), IdentityError::SeveralUris { count: 2 });
        }
    }
}

#[test]
fn hostile_and_missing_dns_names_are_refused() {
    for text in
        ["", ".", "a..b", "a.example.", "a\0.example", "a b", "-a.example", "a-.example", "a.*.example", "*"]
    {
        let refused = identity_of(vec![dns("good.example"), dns(text)]).unwrap_err();
        assert!(matches!(refused, IdentityError::Dns { .. }), "{text:?}: {refused}");
    }
    assert!(matches!(identity_of(vec![dns(&"a".repeat(64))]), Err(IdentityError::Dns { .. })));
    assert!(matches!(identity_of(vec![dns(&"a.".repeat(127)), dns("b")]), Err(IdentityError::Dns { .. })));
    let many = (0..65).map(|n| dns(&format!("h{n}.example"))).collect();
    assert_eq!(identity_of(many).unwrap_err(), IdentityError::TooManyNames { count: 65 });
    for nobody in [vec![], vec![dns("*.example")], vec![SanType::IpAddress([127, 0, 0, 1].into())]] {
        assert!(matches!(identity_of(nobody), Err(IdentityError::Names { .. })));
    }
}

#[test]
fn a_key_keeps_its_hash_in_another_certificate() {
    let ca = authority();
    let [a, b] = [(); 2].map(|()| ca.issue(&spiffe("/a"), &[], &[], day()).unwrap());
    let hash = |certificate: &LabCertificate| PublicKeyHash::of_certificate(&certificate.der).unwrap();
    assert_ne!(hash(&a), hash(&b));
    assert_eq!(hash(&a), PeerCertificate::from_der(&a.der).unwrap().public_key_hash);
    assert_eq!(hash(&a).to_string().len(), 64);
}

#[test]
fn the_digest_is_sha_256() {
    let empty = sha256(b"").unwrap();
    assert_eq!(empty[..4], [0xe3, 0xb0, 0xc4, 0x42]);
    assert_eq!(empty[28..], [0x78, 0x52, 0xb8, 0x55]);
}

proptest! {
    #[test]
    fn no_bytes_are_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let der = CertificateDer::from(bytes);
        let _ = PeerCertificate::from_der(&der);
        let _ = validity_of(&der);
    }

    #[test]
    fn no_damage_to_a_certificate_is_a_panic(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        length in any::<prop::sample::Index>(),
    ) {
        thread_local!(static WHOLE: Vec<u8> = {
            let names = vec![uri("spiffe://lab.example/a"), dns("a.example"), dns("b.example")];
            authority().issue_names(names, day()).unwrap().der.to_vec()
        });
        let mut bytes = WHOLE.with(Clone::clone);
        for (place, value) in damage {
            let place = place.index(bytes.len());
            bytes[place] = value;
        }
        let _ = PeerCertificate::from_der(&CertificateDer::from(bytes.clone()));
        bytes.truncate(length.index(bytes.len()));
        prop_assert!(PeerCertificate::from_der(&CertificateDer::from(bytes)).is_err());
    }

    #[test]
    fn what_is_accepted_is_plain_and_reads_the_same(text in "(spiffe://)?[a-zA-Z0-9./_\\-*%\\x00-\\x20é]{0,60}") {
        if let Ok(id) = text.parse::<SpiffeId>() {
            prop_assert_eq!(id.to_string(), text.clone());
            prop_assert!(text.bytes().all(|b| b.is_ascii_graphic()));
            prop_assert_eq!(format!("spiffe://{}{}", id.trust_domain(), id.path()), text.clone());
        }
        if let Ok(name) = text.parse::<DnsName>() {
            prop_assert!(name.as_str().bytes().all(|b| b.is_ascii_graphic() && !b.is_ascii_uppercase()));
        }
    }
}
