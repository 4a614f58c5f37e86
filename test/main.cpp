// The test program: one line per test case while they run, and at the end "N passed, N failed, N skipped".
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <chrono>
#include <cstdio>
#include <string>

#include "../transxssm.h"

namespace {

struct Count {
    unsigned passed = 0, failed = 0, skipped = 0;
    void print() const {
        fflush(stderr);
        printf("%u passed, %u failed, %u skipped\n", passed, failed, skipped);
        fflush(stdout);
    }
} count;

// Tests named "cuda: ..." need a GPU. Asked for in main(): before it, CUDA does not know its kernels.
std::string why_no_gpu() {
#ifdef WITH_CUDA
    return cuda::problem();
#else
    return "this build has no CUDA engine";
#endif
}
bool gpu = true;

// Counts test cases. A case is skipped by its decorator, skip(true), or because it needs a GPU and none is here.
struct Listener : doctest::IReporter {
    const doctest::TestCaseData* current = nullptr;
    std::chrono::steady_clock::time_point start;
    bool crashed = false;

    explicit Listener(const doctest::ContextOptions&) {}
    void report_query(const doctest::QueryData&) override {}
    void test_run_start() override {}
    void test_run_end(const doctest::TestRunStats& run) override {
        count.passed = run.numTestCasesPassingFilters - run.numTestCasesFailed;
        count.failed = run.numTestCasesFailed;
        if (crashed) count.print();  // main() will not get to it
    }
    void test_case_start(const doctest::TestCaseData& test) override {
        current = &test;
        start = std::chrono::steady_clock::now();
    }
    void test_case_reenter(const doctest::TestCaseData&) override {}
    void test_case_end(const doctest::CurrentTestCaseStats& stats) override {
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        printf("%7.2f s  %s%s\n", seconds.count(), stats.failure_flags ? "FAILED  " : "", current->m_name);
        fflush(stdout);
    }
    void test_case_exception(const doctest::TestCaseException& e) override { crashed = crashed || e.is_crash; }
    void subcase_start(const doctest::SubcaseSignature&) override {}
    void subcase_end() override {}
    void log_assert(const doctest::AssertData&) override {}
    void log_message(const doctest::MessageData&) override {}
    void test_case_skipped(const doctest::TestCaseData& test) override {
        const bool needs_gpu = std::string(test.m_name).compare(0, 5, "cuda:") == 0;
        if (!test.m_skip && (gpu || !needs_gpu)) return;  // it was the command line that left it out
        ++count.skipped;
        printf("  skipped  %s\n", test.m_name);
    }
};

}  // namespace

DOCTEST_REGISTER_LISTENER("count", 1, Listener);

int main(int argc, char** argv) {
    spin_briefly(argv);
    doctest::Context context;
    context.setOption("no-intro", true);
    context.applyCommandLine(argc, argv);
    const std::string problem = why_no_gpu();
    if (!problem.empty()) {
        gpu = false;
        printf("GPU tests are left out: %s\n", problem.c_str());
        context.addFilter("test-case-exclude", "cuda:*");
    }
    const int status = context.run();
    if (context.shouldExit()) return status;  // --help, --list-test-cases
    count.print();
    return status;
}
