"""The tables of a store, in the dialects of SQLite and PostgreSQL; triggers keep what each owner has in sum.

One script for each version of a schema. Statements about these tables are the same for both (`database.py`).
"""

from __future__ import annotations

SQLITE = (
    """
    CREATE TABLE records (
        kind TEXT NOT NULL, id TEXT NOT NULL, owner TEXT NOT NULL,
        created REAL NOT NULL, expires REAL, used REAL NOT NULL,
        parent TEXT, state TEXT, size INTEGER NOT NULL, body BLOB NOT NULL, tokens BLOB NOT NULL,
        UNIQUE (kind, id)
    );
    CREATE INDEX records_by_owner ON records (owner, kind, created);
    CREATE INDEX records_by_use ON records (owner, used);
    CREATE INDEX records_by_state ON records (state) WHERE state IS NOT NULL;
    CREATE INDEX records_by_expiry ON records (expires) WHERE expires IS NOT NULL;

    CREATE TABLE states (id TEXT PRIMARY KEY, owner TEXT NOT NULL, used REAL NOT NULL, size INTEGER NOT NULL);
    CREATE INDEX states_by_use ON states (owner, used);
    CREATE TABLE gone (id TEXT NOT NULL);  -- states whose files have to be removed

    CREATE TABLE totals (
        owner TEXT PRIMARY KEY, records INTEGER NOT NULL, states INTEGER NOT NULL, size INTEGER NOT NULL
    );

    CREATE TRIGGER record_added AFTER INSERT ON records BEGIN
        INSERT INTO totals VALUES (NEW.owner, 1, 0, NEW.size)
            ON CONFLICT (owner) DO UPDATE SET records = records + 1, size = size + NEW.size;
    END;
    CREATE TRIGGER record_sized AFTER UPDATE OF size ON records BEGIN
        UPDATE totals SET size = size + NEW.size - OLD.size WHERE owner = NEW.owner;
    END;
    CREATE TRIGGER record_removed AFTER DELETE ON records BEGIN
        UPDATE totals SET records = records - 1, size = size - OLD.size WHERE owner = OLD.owner;
        DELETE FROM totals WHERE owner = OLD.owner AND records = 0 AND states = 0;
    END;
    CREATE TRIGGER state_added AFTER INSERT ON states BEGIN
        INSERT INTO totals VALUES (NEW.owner, 0, 1, NEW.size)
            ON CONFLICT (owner) DO UPDATE SET states = states + 1, size = size + NEW.size;
    END;
    CREATE TRIGGER state_removed AFTER DELETE ON states BEGIN
        UPDATE totals SET states = states - 1, size = size - OLD.size WHERE owner = OLD.owner;
        DELETE FROM totals WHERE owner = OLD.owner AND records = 0 AND states = 0;
        UPDATE records SET state = NULL WHERE state = OLD.id;
        INSERT INTO gone VALUES (OLD.id);
    END;
    CREATE TRIGGER last_use_removed AFTER DELETE ON records WHEN OLD.state IS NOT NULL BEGIN
        DELETE FROM states WHERE id = OLD.state AND NOT EXISTS (SELECT 1 FROM records WHERE state = OLD.state);
    END;
    CREATE TRIGGER last_use_changed AFTER UPDATE OF state ON records WHEN OLD.state IS NOT NULL BEGIN
        DELETE FROM states WHERE id = OLD.state AND NOT EXISTS (SELECT 1 FROM records WHERE state = OLD.state);
    END;

    CREATE TABLE about (name TEXT PRIMARY KEY, value BLOB NOT NULL);
    """,
    """
    CREATE TABLE coming (id TEXT PRIMARY KEY, until REAL NOT NULL);  -- states whose files are being uploaded
    """,
)

POSTGRESQL = (
    """
    CREATE TABLE records (
        rowid BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        kind TEXT NOT NULL, id TEXT NOT NULL, owner TEXT NOT NULL,
        created DOUBLE PRECISION NOT NULL, expires DOUBLE PRECISION, used DOUBLE PRECISION NOT NULL,
        parent TEXT, state TEXT, size BIGINT NOT NULL, body BYTEA NOT NULL, tokens BYTEA NOT NULL,
        UNIQUE (kind, id)
    );
    CREATE INDEX records_by_owner ON records (owner, kind, created);
    CREATE INDEX records_by_use ON records (owner, used);
    CREATE INDEX records_by_state ON records (state) WHERE state IS NOT NULL;
    CREATE INDEX records_by_expiry ON records (expires) WHERE expires IS NOT NULL;

    CREATE TABLE states (
        id TEXT PRIMARY KEY, owner TEXT NOT NULL, used DOUBLE PRECISION NOT NULL, size BIGINT NOT NULL
    );
    CREATE INDEX states_by_use ON states (owner, used);
    CREATE TABLE gone (id TEXT NOT NULL);
    CREATE TABLE coming (id TEXT PRIMARY KEY, until DOUBLE PRECISION NOT NULL);
    CREATE TABLE processes (name TEXT PRIMARY KEY, seen DOUBLE PRECISION NOT NULL);  -- that use the store

    CREATE TABLE totals (
        owner TEXT PRIMARY KEY, records BIGINT NOT NULL, states BIGINT NOT NULL, size BIGINT NOT NULL
    );

    CREATE TABLE about (name TEXT PRIMARY KEY, value BYTEA NOT NULL);

    CREATE FUNCTION record_added() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        INSERT INTO totals AS t VALUES (NEW.owner, 1, 0, NEW.size)
            ON CONFLICT (owner) DO UPDATE SET records = t.records + 1, size = t.size + NEW.size;
        RETURN NULL;
    END $$;
    CREATE FUNCTION record_sized() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        UPDATE totals SET size = size + NEW.size - OLD.size WHERE owner = NEW.owner;
        RETURN NULL;
    END $$;
    CREATE FUNCTION record_removed() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        UPDATE totals SET records = records - 1, size = size - OLD.size WHERE owner = OLD.owner;
        DELETE FROM totals WHERE owner = OLD.owner AND records = 0 AND states = 0;
        RETURN NULL;
    END $$;
    CREATE FUNCTION state_added() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        INSERT INTO totals AS t VALUES (NEW.owner, 0, 1, NEW.size)
            ON CONFLICT (owner) DO UPDATE SET states = t.states + 1, size = t.size + NEW.size;
        RETURN NULL;
    END $$;
    CREATE FUNCTION state_removed() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        UPDATE totals SET states = states - 1, size = size - OLD.size WHERE owner = OLD.owner;
        DELETE FROM totals WHERE owner = OLD.owner AND records = 0 AND states = 0;
        UPDATE records SET state = NULL WHERE state = OLD.id;
        INSERT INTO gone VALUES (OLD.id);
        RETURN NULL;
    END $$;
    CREATE FUNCTION last_use_ended() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        DELETE FROM states WHERE id = OLD.state AND NOT EXISTS (SELECT 1 FROM records WHERE state = OLD.state);
        RETURN NULL;
    END $$;

    CREATE TRIGGER record_added AFTER INSERT ON records FOR EACH ROW EXECUTE FUNCTION record_added();
    CREATE TRIGGER record_sized AFTER UPDATE OF size ON records FOR EACH ROW EXECUTE FUNCTION record_sized();
    CREATE TRIGGER record_removed AFTER DELETE ON records FOR EACH ROW EXECUTE FUNCTION record_removed();
    CREATE TRIGGER state_added AFTER INSERT ON states FOR EACH ROW EXECUTE FUNCTION state_added();
    CREATE TRIGGER state_removed AFTER DELETE ON states FOR EACH ROW EXECUTE FUNCTION state_removed();
    CREATE TRIGGER last_use_removed AFTER DELETE ON records FOR EACH ROW
        WHEN (OLD.state IS NOT NULL) EXECUTE FUNCTION last_use_ended();
    CREATE TRIGGER last_use_changed AFTER UPDATE OF state ON records FOR EACH ROW
        WHEN (OLD.state IS NOT NULL) EXECUTE FUNCTION last_use_ended();
    """,
)
