-- A database in memory; ROWS is replaced by a number.
CREATE TABLE item(id INTEGER PRIMARY KEY, price INT, note TEXT);
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ROWS)
  INSERT INTO item SELECT i, (i * 7919) % (ROWS + 9), 'text of a row ' || i FROM n;
CREATE INDEX by_price ON item(price);
UPDATE item SET note = note || price WHERE id % 3 = 0;
DELETE FROM item WHERE id % 7 = 1;
SELECT count(*), sum(price), sum(length(note)), max(note) FROM item;
SELECT sum(a.price * b.id % 1009) FROM item a JOIN item b ON a.price = b.id;
PRAGMA integrity_check;
