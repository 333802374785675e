-- One round: tables, indexes, joins, updates, deletes; every answer is the same in every round. Ends with a line ".".
CREATE TABLE item(id INTEGER PRIMARY KEY, owner INTEGER, price INTEGER, note TEXT);
CREATE TABLE owner(id INTEGER PRIMARY KEY, name TEXT, picture BLOB);
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 40000)
INSERT INTO item SELECT i, i * 31 % 2003, i * 65537 % 99991, printf('note %d of %x', i % 101, i * 48271 % 2147483647) FROM n;
WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < 2002)
INSERT INTO owner SELECT i, 'owner ' || (i * i % 997), CAST(printf('%.*c%x', i % 4096, 'p', i * 7) AS BLOB) FROM n;
CREATE INDEX item_owner ON item(owner, price);
CREATE INDEX item_note ON item(note);
BEGIN;
UPDATE item SET price = price + owner % 17, note = note || ' changed' WHERE id % 3 = 0;
DELETE FROM item WHERE id % 7 = 1;
SAVEPOINT undone;
UPDATE item SET note = 'this is rolled back' WHERE id % 2 = 0;
ROLLBACK TO undone;
COMMIT;
SELECT 'items', count(*), sum(price), sum(length(note)), max(note) FROM item;
SELECT 'owners', count(*), sum(length(picture)), max(substr(picture, -9)) FROM owner;
SELECT 'join', count(*), sum(total % 1009), sum(number) FROM
  (SELECT min(owner.id) AS id, sum(price) AS total FROM item JOIN owner ON item.owner = owner.id GROUP BY owner.name)
  AS sums JOIN kept ON kept.id = sums.id + 1;
SELECT 'sorted', sum(place * price % 10007) FROM (SELECT row_number() OVER (ORDER BY note DESC, id) AS place, price FROM item);
SELECT 'kept', count(*), sum(number), sum(length(text)), max(text) FROM kept;
PRAGMA integrity_check;
DROP TABLE item;
DROP TABLE owner;
SELECT '.';
