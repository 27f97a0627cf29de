//! The admin listener: what a probe, a scraper and a person get to see.

use selvedge_tests::TestBroker;

#[tokio::test]
async fn probes_metrics_and_status_tell_what_is_going_on() {
    let broker = TestBroker::open().await;
    let press = broker.client("press-7").await;
    let _line = press.subscribe("line/#").await.unwrap();
    for (path, answer) in [("/healthz", "ok\n"), ("/readyz", "ready\n")] {
        assert_eq!(broker.get(path).await, answer, "{path}");
    }
    let status = broker.get("/api/status").await;
    for expected in [
        "\"identity\":\"spiffe://test.example/fabric/cloud/broker\"",
        "\"identity\":\"spiffe://test.example/acme/plant-1/press-7\"",
        "\"subscriptions\":1",
    ] {
        assert!(status.contains(expected), "{expected} is not in {status}");
    }
    assert!(broker.get("/").await.starts_with("<!"));
    let quic = [("listener", "quic")];
    assert_eq!(broker.metric("selvedge_connections", &quic).await, 1);
    press.close().await;
    let gone = || async { (broker.metric("selvedge_connections", &quic).await == 0).then_some(()) };
    selvedge_tests::wait::eventually("the connection to be gone", gone).await;
}
