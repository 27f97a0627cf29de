"""Runs one suite of paho.mqtt.testing whole: its own command line takes no port in the one and no host
in the other. The names are those that its `__main__` sets.

    paho.py SUITE PORT [TEST]
"""

import importlib
import sys
import unittest

sys.path.insert(0, ".")
name, port = sys.argv[1:3]
suite = importlib.import_module(name)
prefix = "client_test5/" if name == "client_test5" else ""
named = {
    "topic_prefix": prefix,
    "topics": [prefix + t for t in ("TopicA", "TopicA/B", "Topic/C", "TopicA/C", "/TopicA")],
    "wildtopics": [
        prefix + t for t in ("TopicA/+", "+/C", "#", "/#", "/+", "+/+", "TopicA/#")
    ],
    "nosubscribe_topics": ("test/nosubscribe",),
    "host": "localhost",
    "port": int(port),
}
for key, value in named.items():
    setattr(suite, key, value)
# It would put other names in their place.
suite.setData = lambda: None
unittest.main(module=suite, argv=[name] + sys.argv[3:], verbosity=2)
