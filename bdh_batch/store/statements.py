"""The statements of a store's database, the same in SQLite and PostgreSQL."""

from __future__ import annotations

from sqlalchemy import bindparam, text

COLUMNS = "id, kind, owner, created, expires, parent, body, tokens, state"
KEY = "kind = :kind AND id = :id AND owner = :owner"

PUT = text(
    "INSERT INTO records (kind, id, owner, created, expires, used, parent, state, size, body, tokens) "
    "VALUES (:kind, :id, :owner, :created, :expires, :now, :parent, "
    "(SELECT id FROM states WHERE id = :state AND owner = :owner), :size, :body, :tokens) "
    "ON CONFLICT (kind, id) DO UPDATE SET created = excluded.created, expires = excluded.expires, "
    "used = excluded.used, parent = excluded.parent, state = excluded.state, size = excluded.size, "
    "body = excluded.body, tokens = excluded.tokens WHERE records.owner = excluded.owner"
)
UPDATE = text(
    f"UPDATE records SET used = :now, size = :size, body = :body, tokens = :tokens WHERE {KEY} RETURNING state"
)
GET = text(f"SELECT {COLUMNS} FROM records WHERE {KEY} AND (expires IS NULL OR expires > :now)")
DELETE = text(f"DELETE FROM records WHERE {KEY}")
POSITION = text(f"SELECT created, rowid FROM records WHERE {KEY}")
LIST = text(
    f"SELECT {COLUMNS.replace('tokens', 'NULL')} FROM records WHERE owner = :owner AND kind = :kind "
    "AND (expires IS NULL OR expires > :now) AND (created, rowid) < (:created, :rowid) "
    "ORDER BY created DESC, rowid DESC LIMIT :limit"
)
# Those whose states were used last; there is no index of `used` alone, and few states beside records.
LATEST = text(
    "SELECT id, owner, parent FROM records WHERE kind = :kind AND (expires IS NULL OR expires > :now) "
    "AND state IN (SELECT id FROM states ORDER BY used DESC LIMIT :most) ORDER BY used DESC"
)
SET_STATE = text(f"UPDATE records SET state = :state WHERE {KEY}")

NOTE_RECORD = text("UPDATE records SET used = :now WHERE kind = :kind AND id = :id AND used < :now")
NOTE_STATE = text(
    "UPDATE states SET used = :now "
    "WHERE id = (SELECT state FROM records WHERE kind = :kind AND id = :id) AND used < :now"
)
REMOVE_EXPIRED = text(
    "DELETE FROM records WHERE rowid IN (SELECT rowid FROM records WHERE expires <= :now LIMIT :most)"
)
REMOVE_RECORD = text(
    "DELETE FROM records WHERE rowid = (SELECT rowid FROM records WHERE owner = :owner "
    "AND (kind, id) <> (:kind, :id) ORDER BY used LIMIT 1)"
)
REMOVE_STATE = text(
    "DELETE FROM states WHERE id = (SELECT id FROM states WHERE owner = :owner AND id <> :id ORDER BY used LIMIT 1)"
)

# Records, states and bytes of all, bytes of one owner, and whether there are files to remove.
SUMS = text(
    "SELECT coalesce(sum(records), 0), coalesce(sum(states), 0), coalesce(sum(size), 0), "
    "coalesce(sum(CASE WHEN owner = :owner THEN size ELSE 0 END), 0), EXISTS (SELECT 1 FROM gone) FROM totals"
)
LARGEST = {column: text(f"SELECT owner FROM totals ORDER BY {column} DESC LIMIT 2") for column in ("size", "records")}

ADD_STATE = text("INSERT INTO states VALUES (:id, :owner, :now, :size)")
DELETE_STATE = text("DELETE FROM states WHERE id = :id")
STATES = text("SELECT id FROM states")

# Files that are to be removed: of states that are gone, and of uploads that nobody has made a state of.
ANNOUNCE = text("INSERT INTO coming VALUES (:id, :until)")
ARRIVE = text("DELETE FROM coming WHERE id = :id")
GIVE_UP = text("UPDATE coming SET until = 0 WHERE id = :id")
TAKE_GONE = text("DELETE FROM gone RETURNING id")
TO_REMOVE = text("SELECT id FROM gone UNION SELECT id FROM coming WHERE until <= :now LIMIT :most")
HAVE_REMOVED = [
    text(f"DELETE FROM {table} WHERE id IN :ids").bindparams(bindparam("ids", expanding=True))
    for table in ("gone", "coming")
]

KEY_CHECK = text("SELECT value FROM about WHERE name = 'key'")
SET_KEY_CHECK = text("INSERT INTO about VALUES ('key', :value)")
