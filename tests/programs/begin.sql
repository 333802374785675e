-- Made once and read in every round: what is cold stays right too.
PRAGMA temp_store = memory;
CREATE TABLE kept(id INTEGER PRIMARY KEY, number INTEGER, text TEXT);
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 150000)
INSERT INTO kept SELECT i, (i * 7919) % 1000003, printf('text %d %s', i * i % 9973, hex(i * 104729)) FROM n;
CREATE INDEX kept_text ON kept(text);
