from bdh_batch.cli import main

raise SystemExit(main())
