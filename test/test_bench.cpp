// The benchmark's own parts: plots, files of figures, options. What it times needs a GPU (test_cuda.cpp has the kernels).
#include "check.h"

namespace {

using Args = std::vector<std::string>;

// How often a text occurs.
int count_of(const std::string& text, const std::string& part) {
    int n = 0;
    for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + part.size())) ++n;
    return n;
}

Plot::Curve curve(const std::string& label, const std::vector<std::pair<double, double>>& points) {
    Plot::Curve c;
    c.label = label;
    c.points = points;
    return c;
}

BenchRow timed(const std::string& kind, const std::string& model, const std::string& what, int64 B, int64 T,
               double ms) {
    BenchRow r(kind, model, what, B, T);
    r.ms = r.ms_25 = r.ms_75 = ms;
    r.runs = 10;
    return r;
}

}  // namespace

TEST_CASE("plot: whatever the points, the file is well-formed and a curve lies inside its axes") {
    CHECK_EQ(xml_problem(plots_svg({})), "");
    Plot p("a < b & \"c\" > \xFF", "x", "y");
    CHECK_EQ(xml_problem(plots_svg({p})), "");
    p.curves = {curve("nothing", {}), curve("holes", {{1, NAN}, {NAN, 2}, {3, HUGE_VAL}})};
    CHECK_EQ(xml_problem(plots_svg({p})), "");
    p.curves = {curve("one point", {{5, 7}})};
    CHECK_EQ(xml_problem(plots_svg({p})), "");
    p.log_x = true;
    CHECK_EQ(xml_problem(plots_svg({p})), "");
    p.curves = {curve("zero on a logarithmic axis", {{0, 1}, {2, 3}})};
    CHECK_EQ(xml_problem(plots_svg({p})), "");

    // y grows upwards, from the axis at the bottom (420) to the point at the top; x grows by octaves.
    p = Plot("title", "tokens", "ms");
    p.log_x = true;
    p.y_low = 0;
    p.curves = {curve("ours", {{512, 0}, {1024, 5}, {2048, 10}}), curve("theirs", {{512, 20}, {2048, 20}})};
    const std::string svg = plots_svg({p, p});
    CHECK_EQ(xml_problem(svg), "");
    CHECK(count_of(svg, "<g ") == 2);
    for (const char* text :
         {">title<", ">tokens<", ">ms<", ">ours<", ">theirs<", ">512<", ">1,024<", ">2,048<", ">20<"})
        CHECK_MESSAGE(count_of(svg, text) == 2, std::string(text));
    CHECK_MESSAGE(contains(svg, "M110.0 420.0 L420.0 "), svg);  // the middle octave is the middle of 110 .. 730
}

TEST_CASE("plot: bars are stacked, each part on those before it") {
    Plot p("a step", "", "ms");
    p.bars = {"one", "two"};
    p.curves = {curve("lower", {{0, 30}, {1, 10}}), curve("upper", {{0, 10}})};
    const std::string svg = plots_svg({p});
    CHECK_EQ(xml_problem(svg), "");
    // The rectangles of bar 0: x, y, height. 40 ms, and 4% of space above, are 372 high from 48 on.
    std::vector<double> y, height;
    for (size_t at = svg.find("<rect x=\"172.0\""); at != std::string::npos;
         at = svg.find("<rect x=\"172.0\"", at + 1)) {
        const std::string tag = svg.substr(at, svg.find('>', at) - at);
        y.push_back(atof(tag.c_str() + tag.find(" y=\"") + 4));
        height.push_back(atof(tag.c_str() + tag.find(" height=\"") + 9));
    }
    REQUIRE(y.size() == 2);
    CHECK(std::fabs(height[0] - 3 * height[1]) < 0.5);
    CHECK(std::fabs(y[0] + height[0] - 420) < 0.15);   // the lower part stands on the axis
    CHECK(std::fabs(y[1] + height[1] - y[0]) < 0.15);  // the upper one stands on it
    CHECK(std::fabs(height[0] + height[1] - 372 / 1.04) < 0.3);
}

TEST_CASE("bench: figures written as CSV are read back, and each case becomes its plots") {
    const TempDir tmp;
    std::vector<BenchRow> rows = {timed("train", "320m hybrid", "step", 16, 4096, 250),
                                  timed("train", "320m hybrid", "step", 4, 16384, 270),
                                  timed("train", "320m hybrid", "evaluation", 16, 4096, 90),
                                  timed("decode", "320m ssm", "token", 64, 512, 4.5),
                                  timed("decode", "320m ssm", "token", 1, 512, 0.5),
                                  timed("ssd", "H12 P64 N128", "forward", 16, 4096, 0.3),
                                  timed("launches", "320m hybrid", "matmul", 16, 4096, 200),
                                  timed("launches", "320m hybrid", "tiny one", 16, 4096, 1),
                                  timed("launches", "320m hybrid", "tiny two, with a comma", 16, 4096, 2),
                                  BenchRow("train", "320m transformer", "step", 1, 65536)};
    rows[0].bytes = 1e9;
    rows[0].copy_share = 0.5;
    rows[9].note = "no room, none at all";
    write_file(tmp / "a.csv", bench_csv(rows));
    std::vector<BenchRow> back;
    read_bench_csv(tmp / "a.csv", &back);
    REQUIRE(back.size() == rows.size());
    for (size_t i = 0; i < rows.size(); ++i) {
        std::string what = rows[i].what;
        std::replace(what.begin(), what.end(), ',', ';');
        CHECK_EQ(back[i].kind + back[i].engine + back[i].model + back[i].what,
                 rows[i].kind + rows[i].engine + rows[i].model + what);
        CHECK(back[i].B == rows[i].B);
        CHECK(back[i].T == rows[i].T);
        if (rows[i].note.empty()) {
            CHECK(std::fabs(back[i].ms - rows[i].ms) < 1e-5 * rows[i].ms);
            CHECK(std::fabs(back[i].tokens - rows[i].tokens) < 1e-4 * rows[i].tokens);
        } else {
            CHECK(std::isnan(back[i].ms));
        }
    }
    const std::string svg = bench_svg(back);
    CHECK_EQ(xml_problem(svg), "");
    CHECK(count_of(svg, "<g ") == 6);  // training, evaluation, two batches of decoding, SSD, the step
    for (const char* text : {">Training<", ">Evaluation<", ">Decoding 64 sequences<", ">Decoding 1 sequence<",
                             ">SSD, forward<", ">One training step<", ">others<", ">matmul<"})
        CHECK_MESSAGE(count_of(svg, text) == 1, std::string(text));
    CHECK(!contains(svg, "tiny"));         // below 2% of the step
    CHECK(!contains(svg, "transformer"));  // has no figure

    const auto problem = [&](const std::string& text) {
        write_file(tmp / "bad.csv", text);
        std::vector<BenchRow> none;
        return error_of([&] { read_bench_csv(tmp / "bad.csv", &none); });
    };
    const std::string head = bench_csv({});
    CHECK_EQ(missing_part(problem(""), {"bad.csv", "empty"}), "");
    CHECK_EQ(missing_part(problem("step,loss\n"), {"bad.csv", "first line"}), "");
    CHECK_EQ(missing_part(problem(head + "train,a\n"), {"bad.csv", "line 2", "17 fields", "found 2"}), "");
    CHECK_EQ(missing_part(problem(head + "train,a,b,c,x,1,1,1,,,,,,,,,\n"), {"bad.csv", "line 2", "not a number"}), "");
}

#ifdef WITH_CUDA
TEST_CASE("bench: every bad option is one line and exit status 2, before a GPU is looked for") {
    const auto bad = [](const Args& args, const Args& parts) {
        Args all = {"bench"};
        all.insert(all.end(), args.begin(), args.end());
        return refusal(run_program("transxssm", all), 2, parts);
    };
    CHECK_EQ(bad({"trian"}, {"'trian'", "'train'"}), "");
    CHECK_EQ(bad({"train", "decode"}, {"'decode'"}), "");
    CHECK_EQ(bad({"train", "--lengths", "512,5x"}, {"--lengths", "'5x'"}), "");
    CHECK_EQ(bad({"train", "--lengths", "512,,1024"}, {"--lengths", "''"}), "");
    CHECK_EQ(bad({"train", "--lengths", "1024", "--step-tokens", "512"}, {"--lengths", "1024", "1..512"}), "");
    CHECK_EQ(bad({"decode", "--batches", "0"}, {"--batches", "0"}), "");
    CHECK_EQ(bad({"decode", "--tokens", "0"}, {"--tokens"}), "");
    CHECK_EQ(bad({"train", "--model", "lstm"}, {"--model", "'lstm'", "ssm"}), "");
    CHECK_EQ(bad({"train", "--model", "ssm,lstm"}, {"--model", "'lstm'", "ssm"}), "");
    CHECK_EQ(bad({"ssd", "--batch", "4"}, {"--batch"}), "");
    CHECK_EQ(bad({"--lengths", "512"}, {"--lengths"}), "");
    CHECK_EQ(bad({"--precision", "fp8"}, {"--precision", "'fp8'"}), "");
    CHECK_EQ(bad({"--preset", "300m"}, {"300m", "320m"}), "");
    CHECK_EQ(bad({"--batch", "1048576", "--seq-len", "4096"}, {"4294967296", "2^31"}), "");
    CHECK_EQ(bad({"plot"}, {"FILE", "--svg"}), "");
    CHECK_EQ(bad({"plot", "a.csv"}, {"--svg"}), "");
    CHECK_EQ(bad({"plot", "a.csv", "--svg", "b.svg", "--repeats", "3"}, {"--repeats"}), "");
    CHECK_EQ(refusal(run_program("transxssm", {"bench", "ssd", "--csv", "/nowhere/a.csv"}), 1, {"/nowhere/a.csv"}), "");
    CHECK_EQ(refusal(run_program("transxssm", {"bench", "ssd", "--d-model", "100"}), 1, {"hidden_size", "100"}), "");
    if (!have_gpu()) CHECK_EQ(refusal(run_program("transxssm", {"bench"}), 1, {"bench", "NVIDIA"}), "");
}

TEST_CASE("bench: plot draws files of figures without a GPU") {
    const TempDir tmp;
    BenchRow theirs = timed("train", "320m transformer", "step", 16, 4096, 310);
    theirs.engine = "PyTorch flash";
    write_file(tmp / "ours.csv", bench_csv({timed("train", "320m hybrid", "step", 16, 4096, 250)}));
    write_file(tmp / "theirs.csv", bench_csv({theirs}));
    const RunResult r =
        run_program("transxssm", {"bench", "plot", tmp / "ours.csv", tmp / "theirs.csv", "--svg", tmp / "both.svg"});
    CHECK_EQ(r.err, "");
    REQUIRE(r.status == 0);
    const std::string svg = read_file(tmp / "both.svg");
    CHECK_EQ(xml_problem(svg), "");
    CHECK(contains(svg, ">320m hybrid<"));
    CHECK(contains(svg, ">PyTorch flash: 320m transformer<"));
    CHECK_EQ(
        refusal(run_program("transxssm", {"bench", "plot", tmp / "none.csv", "--svg", tmp / "x.svg"}), 1, {"none.csv"}),
        "");
}
#endif

TEST_CASE("cuda: bench runs every case, draws it, and goes on where memory is short") {
    const TempDir tmp;
    const RunResult all = run_program(
        "transxssm", {"bench",    "all",        "--preset", "tiny",        "--step-tokens", "256",        "--lengths",
                      "64,256",   "--contexts", "16",       "--batches",   "1,3",           "--repeats",  "3",
                      "--tokens", "4",          "--csv",    tmp / "a.csv", "--svg",         tmp / "a.svg"});
    CHECK_EQ(all.err, "");
    REQUIRE(all.status == 0);
    std::vector<BenchRow> rows;
    read_bench_csv(tmp / "a.csv", &rows);
    std::map<std::string, int> seen;
    for (const BenchRow& r : rows) {
        CHECK_MESSAGE(r.ms > 0, (r.kind + " " + r.model + " " + r.what));
        ++seen[r.kind];
    }
    CHECK(seen["ceilings"] == 2);
    CHECK(seen["train"] == 12);  // three models, two lengths, step and evaluation
    CHECK(seen["launches"] > 30);
    CHECK(seen["prefill"] == 6);
    CHECK(seen["decode"] == 6);
    CHECK(seen["ssd"] == 6);
    CHECK(seen["attention"] == 6);
    CHECK(seen["gemm"] == 21);  // three of six products, and of all together
    CHECK_EQ(xml_problem(read_file(tmp / "a.svg")), "");

    const RunResult large =
        run_program("transxssm", {"bench", "decode", "--preset", "tiny", "--model", "hybrid", "--contexts",
                                  "16,16777216", "--batches", "100", "--tokens", "4", "--csv", tmp / "b.csv"});
    CHECK(large.status == 0);
    CHECK_MESSAGE(contains(large.out, "are free"), large.out);
    rows.clear();
    read_bench_csv(tmp / "b.csv", &rows);
    REQUIRE(rows.size() == 4);
    CHECK(rows[2].ms > 0);
    CHECK(std::isnan(rows[3].ms));
}
